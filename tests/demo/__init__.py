# SPDX-License-Identifier: Apache-2.0
"""`./run demo`: a streaming VM, served by the hypervisor, before a stranger's eyes."""
