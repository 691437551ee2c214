# SPDX-License-Identifier: Apache-2.0
"""Moving a live TCP connection from one kernel to another: the steps that both sides share."""
