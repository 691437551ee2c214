# SPDX-License-Identifier: Apache-2.0
"""Guest images: a small Debian with the agent inside, built without loop mounts."""
