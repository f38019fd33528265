# SPDX-License-Identifier: Apache-2.0
"""Keys in blocks, and where a previous version's keys have gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_values import nested
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import values_of_keys

from kvcomm_vllm.config import ConfigError, KVCommConfig, keys
from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.config.key import key
from kvcomm_vllm.config.mapping import Reader
from kvcomm_vllm.config.moved import MOVED


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "my.yaml"


def refusal(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        KVCommConfig.from_mapping(mapping, "test")
    return [line.removeprefix("test: ") for line in str(caught.value).splitlines()]


@dataclass(frozen=True)
class Inner:
    depth: int = key(3, "", low=0, high=9)


@dataclass(frozen=True)
class Outer:
    width: int = key(1, "", low=0, high=9)
    inner: Inner = field(default_factory=Inner)


def test_a_block_is_a_field_that_holds_a_dataclass_of_keys() -> None:
    reader = Reader(Outer, {"depth": "inner.depth"})
    assert list(reader.keys) == ["width", "inner.depth"]
    assert reader.read({"inner": {"depth": 5}}, "test") == (Outer(inner=Inner(5)), ())
    assert reader.read({"depth": 5, "width": 2}, "test") == (Outer(2, Inner(5)), ("depth",))


@settings(deadline=None)
@given(values_of_keys, st.data())
def test_old_names_mean_what_the_new_ones_do_and_are_told_once(
    file: Path, values: dict[str, object], data: st.DataObject
) -> None:
    old_of = {new: old for old, new in MOVED.items()}
    moved = [name for name in values if name in old_of and data.draw(st.booleans())]
    mixed = nested({name: value for name, value in values.items() if name not in moved})
    mixed |= {old_of[name]: values[name] for name in moved}
    config = KVCommConfig.from_mapping(mixed, "test")
    assert config == KVCommConfig.from_mapping(nested(values), "test")
    assert sorted(config.moved) == sorted(old_of[name] for name in moved)
    for mapping, names in ((config.to_mapping(), ()), (config.to_mapping(as_given=True), moved)):
        file.write_text(yaml.safe_dump(mapping))
        again = load_file(file)
        assert again == config
        assert sorted(again.moved) == sorted(old_of[name] for name in names)


def test_every_old_name_leads_to_a_key_and_is_none_itself() -> None:
    assert set(MOVED.values()) <= set(keys())
    assert not set(MOVED) & set(keys())


def test_a_warning_names_each_old_key_with_its_new_place() -> None:
    values = {old: keys()[new].default for old, new in MOVED.items()}
    (warning,) = KVCommConfig.from_mapping(values, "test").warnings()
    assert "\n" not in warning
    for old, new in MOVED.items():
        assert f"{old} is {new}" in warning


@pytest.mark.parametrize("order", [1, -1])
def test_an_old_and_a_new_name_together_are_refused(order: int) -> None:
    pairs = [("ridge", 0.5), ("estimator", {"ridge": 0.7})][::order]
    (line,) = refusal(dict(pairs))
    assert line == "ridge: is the old name of estimator.ridge, which is given, too; leave it out"
    assert "max_placeholders" in refusal({"max_placeholders": 7, "max_slots": 7})[0]


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"estimator": {"xyz": 1}}, "unknown key 'estimator.xyz'; allowed in estimator: head_t"),
        ({"estimator": {"rigde": 1}}, "'estimator.rigde'; did you mean 'estimator.ridge'? all"),
        ({"estimator": {"gamma": 1}}, "did you mean 'paper.gamma'? allowed in estimator: "),
        ({"estimator": {"paper_gamma": 1}}, "did you mean 'paper.gamma'? allowed in estimator: "),
        ({"paper": {"seam_tokens": 1}}, "did you mean 'seam_tokens'? allowed in paper: memory_mb"),
        ({"gamma": 1}, "unknown key 'gamma'; did you mean 'paper.gamma'? all keys are in"),
        ({"paper_gama": 1}, "did you mean 'paper.gamma'? "),
        ({"max_slot": 1}, "did you mean 'max_placeholders'? "),
        ({"estimators": {}}, "did you mean 'estimator'? "),
        ({"estimator.ridge": 1}, "'estimator.ridge'; write it as `ridge:` below `estimator:`; all"),
        ({"estimator": 1}, "estimator: 1 is no block of keys; allowed in estimator: head_tokens"),
        ({"estimator": {"ridge": "x"}}, "estimator.ridge: 'x' is text; allowed: a number from"),
        ({"ridge": "x"}, "ridge: 'x' is text; allowed: a number from"),
        ({"estimator": {7: 1}}, "unknown key ['estimator', 7]; allowed in estimator: "),
        ({"paper": {"x" * 10**6: 1}}, "unknown key 'paper.xxx"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_key_or_value_of_a_block_is_refused_by_its_whole_name(
    mapping: dict[str, Any], said: str
) -> None:
    (line,) = refusal(mapping)
    assert said in line
    assert len(line) < 300


@pytest.mark.parametrize("content", ["estimator:\npaper: {}\n", "estimator: ~\n"])
def test_a_block_may_be_empty(file: Path, content: str) -> None:
    file.write_text(content)
    assert load_file(file) == KVCommConfig()


def test_a_key_given_twice_in_a_block_is_refused_with_its_line(file: Path) -> None:
    file.write_text("estimator:\n  ridge: 1.0\n  ridge: 2.0\n")
    with pytest.raises(ConfigError, match=r"key 'estimator.ridge' is given twice \(line 3, "):
        load_file(file)


def test_a_block_inside_a_block_is_no_value(file: Path) -> None:
    file.write_text("estimator: &again\n  ridge: *again\n")
    with pytest.raises(
        ConfigError, match=r"estimator\.ridge: \{\.\.\.: \.\.\.\} is a mapping; allowed"
    ):
        load_file(file)
