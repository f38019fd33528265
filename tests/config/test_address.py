# SPDX-License-Identifier: Apache-2.0
"""Promises of servers' addresses: what is allowed, and that no password is ever printed."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
from pathlib import Path

import pytest
import yaml

from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.config.address import Address, Place

SECRET = "s3cret"
URL = f"valkey://:{SECRET}@cache.example:6379/2"


def configured(shared: str, host_gb: float = 4) -> KVCommConfig:
    return KVCommConfig.from_mapping({"tiers": {"host_gb": host_gb, "shared": shared}}, "test")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("valkey://cache:6379", Place("cache", 6379, "", 0)),
        ("redis://10.0.0.1:1/15", Place("10.0.0.1", 1, "", 15)),
        ("valkey://[::1]:6379/", Place("::1", 6379, "", 0)),
        ("valkey://:a%2Fb@cache:6379", Place("cache", 6379, "a/b", 0)),
        (URL, Place("cache.example", 6379, SECRET, 2)),
    ],
)
def test_an_address_says_where_a_server_is(url: str, place: Place) -> None:
    assert configured(url).tiers.server == place


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@cache:6379",
        f"valkey://user:{SECRET}@cache:6379",
        f"valkey://:{SECRET}@cache",
        f"valkey://:{SECRET}@cache:port",
        f"valkey://:{SECRET}@cache:99999",
        f"valkey://:{SECRET}@:6379",
        f"valkey://:{SECRET}/x@cache:6379",
        f"valkey://:{SECRET}@cache:6379/name",
        f"valkey://cache:6379?password={SECRET}",
        f"valkey://cache:6379#{SECRET}",
        f"valkey://:{SECRET}",
        f":{SECRET}@cache:6379",
        f"valkey://:{SECRET}\n@cache:6379",
        f"valkey://:{SECRET}@[cache:6379",
        "valkey://",
        "cache:6379",
        " ",
    ],
)
def test_any_other_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^test: tiers.shared: .*; allowed: ") as caught:
        configured(url)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_shared_server_needs_a_pool_that_pages_pass_through() -> None:
    with pytest.raises(ConfigError, match=r"^test: tiers.shared: .*set tiers.host_gb"):
        configured(URL, host_gb=0)


def test_a_password_is_not_printed() -> None:
    config = configured(URL)
    assert "tiers.shared=valkey://***@cache.example:6379/2*" in config.describe()
    for told in (repr(config), config.describe(), f"{config.tiers.shared}", repr([Address(URL)])):
        assert SECRET not in told


def test_a_password_is_not_lost_on_the_way_to_the_engine() -> None:
    config = configured(URL)
    given = {"tiers": {"host_gb": 4, "shared": config.tiers.shared}}
    for sent in (given, copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert SECRET not in str(sent)
        assert KVCommConfig.from_mapping(sent, "test").tiers.server.password == SECRET
    for written in (
        json.loads(json.dumps(given)),
        yaml.safe_load(yaml.safe_dump(config.to_mapping())),
    ):
        assert KVCommConfig.from_mapping(written, "test") == config


@pytest.mark.parametrize("by_file", [True, False], ids=["file", "json"])
def test_vllm_is_not_told_of_a_password_that_it_would_log(by_file: bool, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvcomm_vllm.plugin import register

    register()
    settings = {"tiers": {"host_gb": 4, "shared": URL}}
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(settings))
    transfer = {"kv_connector": "kvcomm", "kv_role": "kv_both"}
    transfer |= {"kv_connector_extra_config": settings}
    ours = ["--kv-connector", "kvcomm", "--kvcomm-config", str(file)]
    flags = ours if by_file else ["--kv-transfer-config", json.dumps(transfer)]
    parser: argparse.ArgumentParser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(flags)
    assert SECRET not in repr(args.kv_transfer_config)
    extra = args.kv_transfer_config.kv_connector_extra_config
    assert KVCommConfig.from_mapping(extra, "test").tiers.server.password == SECRET
