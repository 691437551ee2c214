# SPDX-License-Identifier: Apache-2.0
"""Properties have no deadline: a slow machine is no defect. Imported by the folders whose tests have some; others need not load
hypothesis, which takes seconds on an emulated kernel."""

from hypothesis import settings

settings.register_profile("streamlift", deadline=None)
settings.load_profile("streamlift")
