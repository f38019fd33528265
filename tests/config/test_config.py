# SPDX-License-Identifier: Apache-2.0
"""Promises of the configuration: what is refused and how, what is kept, what is generated."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from any_values import HUGE, Huge, is_short_line, python_values
from config_values import allowed_values, nested
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.config import MAX_PROBLEMS, ConfigError, KVCommConfig, keys
from kvcomm_vllm.config.docs import GROUPS, generated
from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.config.moved import MOVED
from kvcomm_vllm.wording import shown

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


TOP = [name for name in keys() if "." not in name]
BLOCKS = ["estimator", "paper", "tiers"]
NAMES = [*keys(), *MOVED, *BLOCKS]
NUMBERS = [name for name, key in keys().items() if type(key.default) in (int, float)]


def name_of(name: object) -> str:
    """How a line about this key, or about one in this block, begins."""
    if name in BLOCKS:
        return ""
    known = name in TOP or name in MOVED
    return f"{name}: " if known else f"unknown key {shown(name)}; "


def complete(values: dict[str, object]) -> dict[str, object]:
    """Mode paper comes with a memory, what lies behind a host pool with one."""
    if values.get("mode") == "paper":
        values["paper.memory_mb"] = values.get("paper.memory_mb") or 1
    behind = ("tiers.disk_path", "tiers.shared", "tiers.secondary_tiers")
    if any(map(values.get, behind)):
        values["tiers.host_gb"] = values.get("tiers.host_gb") or 1.0
    return values


values_of_keys = st.fixed_dictionaries(
    {}, optional={name: allowed_values(key) for name, key in keys().items()}
).map(complete)
configs = values_of_keys.map(nested)


def test_mode_paper_without_a_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^my.yaml: paper.memory_mb: mode paper needs"):
        KVCommConfig.from_mapping({"mode": "paper"}, "my.yaml")


def test_a_disk_without_a_host_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^my.yaml: tiers.disk_path: .* set tiers.host_gb"):
        KVCommConfig.from_mapping({"tiers": {"disk_path": "/kv"}}, "my.yaml")


@pytest.mark.parametrize("value", [3, True, None, ["a"], "a\nb", "a\0"])
def test_a_path_is_text_of_one_line(value: object) -> None:
    with pytest.raises(ConfigError, match=r"tiers.disk_path: .*; allowed: text"):
        KVCommConfig.from_mapping({"tiers": {"disk_path": value, "host_gb": 1}}, "my.yaml")


@given(values_of_keys)
def test_allowed_values_survive_a_round_trip_through_json(given_values: dict[str, object]) -> None:
    config = KVCommConfig.from_mapping(nested(given_values), "test")
    again = KVCommConfig.from_mapping(json.loads(json.dumps(config.to_mapping())), "test")
    assert again == config
    for name, value in given_values.items():
        assert config.values()[name] == value


@given(values_of_keys, st.data())
def test_a_value_outside_its_bounds_is_refused_by_name(
    values: dict[str, object], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(NUMBERS))
    key = keys()[name]
    bad = [key.low - 1, key.high + 1, math.nan, math.inf, 10**400, -(10**5000)]
    wrong = {**values, name: data.draw(st.sampled_from(bad))}
    with pytest.raises(ConfigError, match=f"^test: {name}: .*allowed: a ") as caught:
        KVCommConfig.from_mapping(nested(wrong), "test")
    assert key.allowed in str(caught.value)


def test_every_number_has_bounds_of_its_own_type_that_hold_its_default() -> None:
    for name in NUMBERS:
        key = keys()[name]
        assert {type(key.low), type(key.high)} == {type(key.default)}, name
        assert -math.inf < key.low <= key.default <= key.high < math.inf, name  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seam_tokens", True, "seam_tokens: True is true/false; allowed: a whole number from 0"),
        (
            "seam_tokens",
            4.0,
            "4.0 is not written as a whole number; allowed: a whole",
        ),
        ("max_sequences", 1e12, "1000000000000.0 is not written as a whole number"),
        ("max_sequences", 10**12, "1000000000000 is out of range; allowed: a whole number from 1"),
        ("seam_tokens", 10**5000, "<number of about 5001 digits> is out of range"),
        (
            "private_price",
            10**5000,
            "<number of about 5001 digits> is out of range; allowed: a num",
        ),
        ("private_price", math.inf, "inf is not a finite number"),
        ("seam_tokens", math.nan, "nan is not a finite number"),
        (
            "private_price",
            b"1" * 5000,
            "... is of another type; allowed: a number from 0.0 to 100.0",
        ),
        ("seam_tokens", "16", "seam_tokens: '16' is text"),
        ("seam_tokens", None, "seam_tokens: None is empty"),
        ("seam_tokens", 5000, "5000 is out of range; allowed: a whole number from 0 to 4096"),
        ("self_check", 1, "self_check: 1 is a whole number; allowed: true or false"),
        ("self_check", "yes", "self_check: 'yes' is text; allowed: true or false"),
        ("report", "yes", "report: 'yes' is not known; allowed: one of auto, coarse, full, off"),
        ("mode", "fast", "mode: 'fast' is not known; allowed: one of off, rotate, seam"),
        ("mode", True, "mode: True is not known"),
        ("min_reuse_share", [0.3], "[0.3] is a list; allowed: a number from 0.0 to 1.0"),
    ],
    ids=shown,
)
def test_a_wrong_value_is_refused_naming_source_key_value_and_what_is_allowed(
    name: str, value: object, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping({name: value}, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {name}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("seam_token", "seam_tokens"), ("seam-tokens", "seam_tokens"), ("Mode", "mode")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{typo}'; did you mean '{meant}'?"):
        KVCommConfig.from_mapping({typo: 1}, "test")


@pytest.mark.parametrize(
    "name", ["zzz", "tokens", "x" * 10**6, "line\nfeed", 7, None, (1, 2)], ids=shown
)
def test_an_unknown_key_is_answered_with_three_known_ones_at_most_and_where_all_are(
    name: object,
) -> None:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping({name: 1}, "test")  # type: ignore[dict-item]
    said = str(caught.value)
    assert said.startswith("test: unknown key ")
    assert said.endswith(" all keys are in docs/config.md and in `vllm serve --help=KVCommConfig`")
    assert sum(f"'{known}'" in said for known in keys()) <= 3
    assert said.isprintable()
    assert len(said) < 300


def test_of_very_many_problems_only_the_first_are_told() -> None:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping({f"key{number}": 1 for number in range(10**5)}, "test")
    *told, last = str(caught.value).splitlines()
    assert len(told) == MAX_PROBLEMS
    assert last == "test: there are more problems"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping({"seam_tokens": -1, "zzz": 0, "report": "no"}, "test")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["test"] * 3


def test_the_configuration_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVCommConfig().seam_tokens = 9999  # type: ignore[misc]


def test_the_log_line_marks_what_differs_from_the_default() -> None:
    line = KVCommConfig(seam_tokens=4, audits=False).describe()
    assert "\n" not in line
    assert [part for part in line.split(", ") if part.endswith("*")] == [
        "seam_tokens=4*",
        "audits=false*",
    ]
    assert len(line.split(", ")) == len(keys())


def test_combinations_that_defeat_themselves_are_warned_about() -> None:
    assert KVCommConfig().warnings() == ()
    assert "window_tokens=64" in KVCommConfig(window_tokens=64).warnings()[0]


def test_every_key_stands_in_one_group_of_the_docs() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(keys())


@pytest.mark.parametrize("path", generated(ROOT), ids=lambda path: path.name)
def test_generated_files_equal_what_the_code_says(path: Path) -> None:
    assert path.read_text() == generated(ROOT)[path], "run: python -m kvcomm_vllm.config.docs"


def test_the_committed_file_lists_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "kvcomm.yaml"
    assert load_file(path) == KVCommConfig()
    assert yaml.safe_load(path.read_text()).keys() == KVCommConfig().to_mapping().keys()
    assert yaml.safe_load(path.read_text()) == KVCommConfig().to_mapping()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_without_warnings(path: Path) -> None:
    assert load_file(path).warnings() == ()


def test_the_presets_are_there_and_differ() -> None:
    assert [path.stem for path in PRESETS] == ["kvcomm", "latency", "paper", "quality"]
    assert len({load_file(path) for path in PRESETS}) == len(PRESETS)


def test_reading_the_configuration_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, kvcomm_vllm.config.file, kvcomm_vllm.config.docs, kvcomm_vllm.hints, "
        "kvcomm_vllm.plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*keys(), *MOVED, *BLOCKS])
        | st.text()
        | st.integers()
        | st.just(Huge(HUGE)),
        python_values,
        max_size=5,
    )
)
def test_any_values_at_all_give_a_configuration_within_bounds_or_short_lines(
    values: dict[str, object],
) -> None:
    try:
        config = KVCommConfig.from_mapping(values, "test")
    except ConfigError as error:
        refused = [name for name in values if f"test: {name_of(name)}" in str(error)]
        assert refused
        for line in str(error).splitlines():
            assert is_short_line(line)
            assert any(line.startswith(f"test: {name_of(name)}") for name in refused)
        return
    for name, value in config.values().items():
        key = keys()[name]
        assert type(value) is type(key.default)
        assert key.problem(value) is None


@pytest.mark.parametrize(("given", "meant"), [(True, "auto"), (False, "off")])
def test_report_may_still_be_yes_or_no(given: bool, meant: str) -> None:
    assert KVCommConfig.from_mapping({"report": given}, "test").report == meant
