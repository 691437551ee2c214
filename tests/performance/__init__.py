# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `./run bench NAME`."""
