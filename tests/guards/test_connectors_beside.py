# SPDX-License-Identifier: Apache-2.0
"""``MultiConnector``: beside a connector that is understood ours stays, beside any other it is left
out with one warning, and the other one works on.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_arguments import MakeArgs
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.engine.arg_utils import EngineArgs

from kvcomm_vllm.compat import cli
from kvcomm_vllm.config import ConfigError
from kvcomm_vllm.guards.connectors import is_understood
from kvcomm_vllm.reasons import Reason

Part = dict[str, Any]

OURS: Part = {"kv_connector": "kvcomm", "kv_role": "kv_both"}
POOL: Part = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 20},
}
# Two name pages by tokens, two send them to other engines; the last one nobody knows.
FOREIGN = ["ExampleConnector", "LMCacheConnectorV1", "NixlConnector", "MooncakeConnector", "Mine"]


def with_parts(
    args_for: MakeArgs, *parts: Part, architecture: str = "LlamaForCausalLM", **more: Any
) -> EngineArgs:
    args = args_for(architecture, **more)
    args.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": list(parts)},
    )
    args.create_model_config()
    return args


def names(args: EngineArgs) -> list[str]:
    transfer: Any = args.kv_transfer_config
    assert transfer.kv_connector == "MultiConnector"
    return [part["kv_connector"] for part in transfer.kv_connector_extra_config["connectors"]]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_beside_what_is_not_understood_ours_is_left_out_and_the_other_stays(
    args_for: MakeArgs, said: list[str], name: str, first: bool
) -> None:
    other = {"kv_connector": name, "kv_role": "kv_both"}
    args = with_parts(args_for, *([OURS, other] if first else [other, OURS]))
    assert names(args) == [name]
    reason = Reason.OTHER_CONNECTOR
    assert said == [
        f"KV reuse is off ({reason}): {reason.explanation} The engine starts without kvcomm and "
        f"serves exactly. Its other connectors stay: {name}."
    ]


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_beside_offloading_ours_stays_in_its_place(
    args_for: MakeArgs, said: list[str], first: bool
) -> None:
    given = [OURS, POOL] if first else [POOL, OURS]
    args = with_parts(args_for, *given)
    assert said == []
    assert names(args) == [part["kv_connector"] for part in given]
    transfer: Any = args.kv_transfer_config
    parts = transfer.kv_connector_extra_config["connectors"]
    ours, pool = parts if first else parts[::-1]
    assert ours["kv_role"] == cli.ROLE
    assert pool == POOL
    assert (transfer.kv_role, transfer.kv_load_failure_policy) == ("kv_both", "recompute")


def test_alone_in_a_multiconnector_ours_stays(args_for: MakeArgs, said: list[str]) -> None:
    assert names(with_parts(args_for, OURS)) == ["kvcomm"]
    assert said == []


def test_what_rules_reuse_out_leaves_the_other_connectors(
    args_for: MakeArgs, said: list[str]
) -> None:
    args = with_parts(args_for, OURS, POOL, enable_prefix_caching=False)
    assert names(args) == ["OffloadingConnector"]
    assert len(said) == 1
    assert said[0].startswith("KV reuse is off (prefix_caching_off)")


def test_our_own_tiers_are_not_tried_beside_another_pool(
    args_for: MakeArgs, said: list[str]
) -> None:
    tiers = {**OURS, "kv_connector_extra_config": {"tiers": {"host_gb": 0.1}}}
    assert names(with_parts(args_for, tiers, POOL)) == ["OffloadingConnector"]
    assert said[0].startswith("KV reuse is off (other_connector)")
    assert names(with_parts(args_for, tiers)) == ["kvcomm"]


def test_a_size_for_offloading_would_put_another_connector_in_the_place_of_all(
    args_for: MakeArgs, said: list[str]
) -> None:
    args = with_parts(args_for, OURS, POOL, kv_offloading_size=1.0)
    assert names(args) == ["OffloadingConnector"]
    assert args.kv_offloading_size == 1.0
    assert said[0].startswith("KV reuse is off (kv_offloading)")


def test_our_part_is_checked_like_ours_alone(args_for: MakeArgs) -> None:
    wrong = {**OURS, "kv_connector_extra_config": {"seam": 3}}
    with pytest.raises(ConfigError, match="seam"):
        with_parts(args_for, POOL, wrong)
    with pytest.raises(ConfigError, match="kv_role"):
        with_parts(args_for, POOL, {**OURS, "kv_role": "kv_consumer"})
    with pytest.raises(ConfigError, match="more than once"):
        with_parts(args_for, OURS, {**OURS, "kv_connector": "KVCommConnector"})


def test_others_without_us_are_not_looked_at(args_for: MakeArgs, said: list[str]) -> None:
    other = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    args = with_parts(args_for, other, POOL)
    assert names(args) == ["ExampleConnector", "OffloadingConnector"]
    transfer: Any = args.kv_transfer_config
    assert transfer.kv_load_failure_policy == "fail"
    assert said == []


def test_a_class_is_understood_by_where_it_comes_from() -> None:
    assert is_understood(OffloadingConnector)
    assert not is_understood(ExampleConnector)
    assert not is_understood(type("OffloadingConnector", (), {}))
    assert not is_understood(type("Mine", (OffloadingConnector,), {}))
