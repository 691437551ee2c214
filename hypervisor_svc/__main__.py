# SPDX-License-Identifier: Apache-2.0
"""`python -m hypervisor_svc` is `streamlift`."""

from hypervisor_svc.cli import main

if __name__ == "__main__":
    main()
