# SPDX-License-Identifier: Apache-2.0
"""Streamlift in the guest: the agent, and the API that servers call (`from guest_agent import offload`)."""

__version__ = "0.1.0"
