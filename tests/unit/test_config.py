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
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.config import ConfigError, KVCommConfig, keys
from kvcomm_vllm.config_docs import generated
from kvcomm_vllm.config_file import load_file
from kvcomm_vllm.config_key import Key

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def allowed_values(key: Key) -> st.SearchStrategy[object]:
    if key.choices:
        return st.sampled_from(key.choices)
    if isinstance(key.default, bool):
        return st.booleans()
    if isinstance(key.default, int):
        return st.integers(key.low, key.high)  # type: ignore[arg-type]
    return st.floats(key.low, key.high)


def complete(values: dict[str, object]) -> bool:
    """Mode paper comes with a memory."""
    return values.get("mode") != "paper" or bool(values.get("paper_memory_mb"))


configs = st.fixed_dictionaries(
    {}, optional={name: allowed_values(key) for name, key in keys().items()}
).filter(complete)


def test_mode_paper_without_a_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^my.yaml: paper_memory_mb: mode paper needs"):
        KVCommConfig.from_mapping({"mode": "paper"}, "my.yaml")


@given(configs)
def test_allowed_values_survive_a_round_trip_through_json(given_values: dict[str, object]) -> None:
    config = KVCommConfig.from_mapping(given_values, "test")
    again = KVCommConfig.from_mapping(json.loads(json.dumps(config.to_mapping())), "test")
    assert again == config
    for name, value in given_values.items():
        assert getattr(config, name) == value


@given(configs, st.data())
def test_a_value_outside_its_bounds_is_refused_by_name(
    values: dict[str, object], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([n for n, k in keys().items() if k.low is not None]))
    key = keys()[name]
    bad = [key.low - 1, math.nan, math.inf] + ([] if key.high is None else [key.high + 1])  # type: ignore[operator]
    with pytest.raises(ConfigError, match=f"^test: {name}: .*allowed: a ") as caught:
        KVCommConfig.from_mapping({**values, name: data.draw(st.sampled_from(bad))}, "test")
    assert key.allowed in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seam_tokens", True, "seam_tokens: True is true/false; allowed: a whole number from 0"),
        ("seam_tokens", 4.0, "is a number with a point"),
        ("seam_tokens", "16", "seam_tokens: '16' is text"),
        ("seam_tokens", None, "seam_tokens: None is empty"),
        ("seam_tokens", 5000, "5000 is out of range; allowed: a whole number from 0 to 4096"),
        ("report", 1, "report: 1 is a whole number; allowed: true or false"),
        ("report", "yes", "report: 'yes' is text; allowed: true or false"),
        ("mode", "fast", "mode: 'fast' is not known; allowed: one of off, rotate, seam"),
        ("mode", True, "mode: True is not known"),
        ("min_reuse_share", [0.3], "is a list; allowed: a number from 0.0 to 1.0"),
    ],
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


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping({"seam_tokens": -1, "zzz": 0, "report": "no"}, "test")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["test"] * 3


def test_the_configuration_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVCommConfig().seam_tokens = 9999  # type: ignore[misc]


def test_the_log_line_marks_what_differs_from_the_default() -> None:
    line = KVCommConfig(seam_tokens=4, report=False).describe()
    assert "\n" not in line
    assert [part for part in line.split(", ") if part.endswith("*")] == [
        "seam_tokens=4*",
        "report=false*",
    ]
    assert len(line.split(", ")) == len(keys())


def test_combinations_that_defeat_themselves_are_warned_about() -> None:
    assert KVCommConfig().warnings() == ()
    assert "window_tokens=64" in KVCommConfig(window_tokens=64).warnings()[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "not valid YAML: expected ',' or ']'"),
        (b"- mode", "must be a mapping of keys to values (lines like `mode: seam`), but is of"),
        (b"seam", "but is of type str"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"mode: seam\nmode: off\n", "key 'mode' is given twice (line 2, column 1)"),
        (b"mode: !!python/object:os.system {}", "not valid YAML: could not determine"),
        (b"[" * 5000, "not valid YAML"),
        (b"1: 2", "unknown key 1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_clear_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_file("nul\0name")


@pytest.mark.parametrize("content", ["", "# only a comment\n", "{}"])
def test_an_empty_file_means_all_defaults(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(content)
    assert load_file(path) == KVCommConfig()


def test_mode_off_can_be_written_without_quotes(tmp_path: Path) -> None:
    path = tmp_path / "off.yaml"
    path.write_text("mode: off")
    assert load_file(path).mode == "off"
    # Other YAML readers, vLLM's among them, turn the word into false.
    assert KVCommConfig.from_mapping(yaml.safe_load("mode: off"), "test").mode == "off"


@pytest.mark.parametrize("path", generated(ROOT), ids=lambda path: path.name)
def test_generated_files_equal_what_the_code_says(path: Path) -> None:
    assert path.read_text() == generated(ROOT)[path], "run: python -m kvcomm_vllm.config_docs"


def test_the_committed_file_lists_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "kvcomm.yaml"
    assert load_file(path) == KVCommConfig()
    assert list(yaml.safe_load(path.read_text())) == list(keys())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_without_warnings(path: Path) -> None:
    assert load_file(path).warnings() == ()


def test_the_presets_are_there_and_differ() -> None:
    assert [path.stem for path in PRESETS] == ["kvcomm", "latency", "paper", "quality"]
    assert len({load_file(path) for path in PRESETS}) == len(PRESETS)


def test_reading_the_configuration_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, kvcomm_vllm.config_file, kvcomm_vllm.config_docs, kvcomm_vllm.hints, "
        "kvcomm_vllm.plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
