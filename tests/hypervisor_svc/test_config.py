# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what it documents it accepts, and what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor_svc.config import Config, ConfigError, document, load, parse


def test_the_documented_defaults_are_the_defaults() -> None:
    assert parse(document()) == Config()


def test_every_key_is_documented() -> None:
    text = document()
    for section, field in Config.model_fields.items():
        assert section in text
        assert field is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[policy]\nthreshold=3\n", ["f.toml:2", "policy.threshold", "threshold_bytes"]),
        ('[redirect]\n\nmode="x"\n', ["f.toml:3", "redirect.mode", "'nat' or 'transparent'"]),
        ("[policy]\nthreshold_bytes = 0\n", ["f.toml:2", "greater than or equal to 1"]),
        ("[redirect]\nport_range = [70, 60]\n", ["f.toml:2", "the smaller first"]),
        ("surprise = 1\n", ["f.toml:1", "unknown key surprise", "policy"]),
        ('[[vm]]\nname="a"\nchannel="c"\nshare="s"\naddresses=["1.2.3"]\n', ["f.toml:5", "1.2.3"]),
        ("[policy\n", ["f.toml", "line 1"]),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "f.toml")
    for part in expected:
        assert part in str(error.value)


def test_addresses_become_canonical() -> None:
    vm = '[[vm]]\nname="a"\nchannel="c"\nshare="s"\naddresses=["2001:DB8:0::1"]\n'
    assert parse(vm).vm[0].addresses == ("2001:db8::1",)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load(str(tmp_path / "nowhere.toml"))
