# SPDX-License-Identifier: Apache-2.0
"""Streamlift on the host: the service and its command line."""

__version__ = "0.1.0"
