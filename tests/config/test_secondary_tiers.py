# SPDX-License-Identifier: Apache-2.0
"""Promises of vLLM's own tiers: passed on as they are, or refused at start; and not printed."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.config.file import load_file

SECRET = "s3cret"
TIERS = [
    {"type": "fs", "root_dir": "/kv", "n_read_threads": 2},
    {"type": "obj", "store_config": {"secret_key": SECRET, "hosts": ["a", "b"]}, "locality": None},
]
TEXT = f"""
tiers:
  host_gb: 4
  secondary_tiers:
    - {{type: fs, root_dir: /kv, n_read_threads: 2}}
    - type: obj
      store_config:
        secret_key: {SECRET}
        hosts: [a, b]
      locality:
"""


def configured(tiers: object, host_gb: float = 4) -> KVCommConfig:
    given = {"tiers": {"host_gb": host_gb, "secondary_tiers": tiers}}
    return KVCommConfig.from_mapping(given, "test")


def test_they_are_passed_on_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(TEXT)
    for config in (configured(TIERS), load_file(file)):
        assert config.tiers.secondary_tiers.plain() == TIERS
        assert config.to_mapping()["tiers"]["secondary_tiers"] == TIERS


def test_who_gets_them_may_change_them() -> None:
    config = configured(TIERS)
    config.tiers.secondary_tiers.plain()[1]["store_config"]["hosts"].clear()
    assert config.tiers.secondary_tiers.plain() == TIERS


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ("fs", "'fs' is text; allowed: a list of mappings"),
        ({"type": "fs"}, "{...} is a mapping; allowed: a list of mappings"),
        (None, "None is empty; allowed"),
        (["fs"], "['fs'] has 'fs' as number 1, which is no mapping; allowed"),
        ([TIERS[0], 3], "3 as number 2, which is no mapping; allowed"),
        ([{"root_dir": "/kv"}], "has no type, or one that is no text, in number 1; allowed"),
        ([{"type": ""}], "has no type, or one that is no text, in number 1; allowed"),
        ([{"type": 7}], "has no type, or one that is no text, in number 1; allowed"),
        ([{"type": "fs", 3: 4}], "has a key that is no text in number 1; allowed"),
        ([{"type": ["fs"], "secret_key": SECRET}], "has no type, or one that is no text, in"),
    ],
    ids=repr,
)
def test_anything_else_is_refused_at_start_and_told_what_is_allowed(
    tiers: object, said: str
) -> None:
    with pytest.raises(ConfigError, match=r"^test: tiers.secondary_tiers: ") as caught:
        configured(tiers)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_they_need_a_pool_that_pages_pass_through() -> None:
    with pytest.raises(ConfigError, match=r"^test: tiers.secondary_tiers: .*set tiers.host_gb"):
        configured(TIERS, host_gb=0)
    assert not configured([], host_gb=0).tiers.wanted


def test_what_is_told_of_them_is_not_printed() -> None:
    config = configured(TIERS)
    assert "tiers.secondary_tiers=[fs + obj]*" in config.describe()
    for told in (repr(config), config.describe(), f"{config.tiers.secondary_tiers}"):
        assert SECRET not in told


def test_it_is_not_lost_on_the_way_to_the_engine() -> None:
    config = configured(TIERS)
    given = {"tiers": {"host_gb": 4, "secondary_tiers": config.tiers.secondary_tiers}}
    for sent in (given, copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert SECRET not in str(sent)
        assert KVCommConfig.from_mapping(sent, "test") == config
    assert KVCommConfig.from_mapping(json.loads(json.dumps(given)), "test") == config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("&a [*a]", "an alias of a list or a mapping is not used here"),
        ("[&a {type: fs}, *a]", "an alias of a list or a mapping is not used here"),
        ("[{type: fs, type: obj}]", "key 'type' is given twice"),
        ("[{[a]: fs}]", "a key must be a word"),
        ("[!!set {fs}]", "tags are not used here"),
    ],
)
def test_a_file_cannot_make_more_of_them_than_stands_in_it(
    tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"tiers:\n  host_gb: 4\n  secondary_tiers: {content}\n")
    with pytest.raises(ConfigError, match="not valid YAML: ") as caught:
        load_file(file)
    assert said in str(caught.value)


def flags(by_file: bool, tiers: object, folder: Path) -> list[str]:
    settings: dict[str, Any] = {"tiers": {"host_gb": 4, "secondary_tiers": tiers}}
    file = folder / "my.yaml"
    file.write_text(json.dumps(settings))
    transfer = {"kv_connector": "kvcomm", "kv_role": "kv_both"}
    transfer |= {"kv_connector_extra_config": settings}
    ours = ["--kv-connector", "kvcomm", "--kvcomm-config", str(file)]
    return ours if by_file else ["--kv-transfer-config", json.dumps(transfer)]


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvcomm_vllm.plugin import register

    register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


ways = pytest.mark.parametrize("by_file", [True, False], ids=["file", "json"])


@ways
def test_vllm_gets_them_and_does_not_log_more_than_their_types(
    parser: Any, by_file: bool, tmp_path: Path
) -> None:
    args = parser.parse_args(flags(by_file, TIERS, tmp_path))
    assert SECRET not in repr(args.kv_transfer_config)
    extra = args.kv_transfer_config.kv_connector_extra_config
    found = KVCommConfig.from_mapping(extra, "test").tiers.secondary_tiers
    assert found.plain() == TIERS


@ways
def test_a_type_that_vllm_does_not_know_is_refused_at_start(
    parser: Any, by_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(flags(by_file, [{"type": "nfs"}], tmp_path))
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "nfs" in line]
    assert "tiers.secondary_tiers: type 'nfs' is not known; allowed: one of " in told
    assert "fs, " in told
    assert "or any with a module_path" in told
    parser.parse_args(flags(by_file, [{"type": "nfs", "module_path": "mine"}], tmp_path))
