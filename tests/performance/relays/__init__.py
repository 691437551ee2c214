# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of relays run beside each other."""
