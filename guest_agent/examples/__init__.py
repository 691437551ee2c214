# SPDX-License-Identifier: Apache-2.0
"""Servers that use the offload API as any application would."""
