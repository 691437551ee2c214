# SPDX-License-Identifier: Apache-2.0
"""Everything that a guest's bytes meet first, fuzzed for as long as you like:

    ./run fuzz --seconds 300

The properties are those of the tests, which Hypothesis tries a hundred times each; here it goes on, with new examples in each
round, until the time is over. The first input that breaks one is printed, shrunk, and the exit status is 1."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings

from tests.guest_agent.handoff import test_anticipated, test_ring_file, test_snapshot, test_wire
from tests.hypervisor_svc import test_policy

PROPERTIES: tuple[Callable[[], None], ...] = (
    test_wire.test_noise_never_crashes,
    test_wire.test_mutated_frames_never_crash,
    test_wire.test_mutated_stream_never_crashes,
    test_wire.test_an_agent_that_dies_at_any_byte_is_replaced,
    test_snapshot.test_mutated_snapshots_never_crash,
    test_snapshot.test_any_json_never_crashes,
    test_ring_file.test_no_header_crashes,
    test_anticipated.test_nothing_that_is_anticipated_crashes,
    test_policy.test_no_request_crashes,
    test_policy.test_no_relay_crashes,
    test_policy.test_no_sink_crashes,
    test_policy.test_no_udp_sink_crashes,
    test_policy.test_no_token_crashes,
    test_policy.test_no_look_crashes,
)
ROUND = settings(
    max_examples=500,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def fuzz(seconds: float, say: Callable[[str], None]) -> Counter[str]:
    """Examples tried, by property. Raises what a property raises."""
    tried: Counter[str] = Counter()
    rounds = {one.__name__: ROUND(one) for one in PROPERTIES}
    end, told = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < end:
        for name, play in rounds.items():
            play()
            tried[name] += ROUND.max_examples
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            say(f"{sum(tried.values()):,} examples, {max(0, end - told):.0f} s to go")
    return tried


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest_agent.handoff.fuzz", description="Fuzz what guests say.")
    parser.add_argument("--seconds", type=float, default=300)
    tried = fuzz(parser.parse_args().seconds, lambda line: print(line, file=sys.stderr, flush=True))
    for name, count in tried.items():
        print(f"{count:9,}  {name}")
    print(f"{sum(tried.values()):9,}  examples, none broke anything")
    return 0


if __name__ == "__main__":
    sys.exit(main())
