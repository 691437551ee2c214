# SPDX-License-Identifier: Apache-2.0
"""What holds for the properties that are tested here."""

import tests.hypothesis_profile  # noqa: F401
