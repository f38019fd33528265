# SPDX-License-Identifier: Apache-2.0
"""Beside whom our part of a ``MultiConnector`` reuses: vLLM's own classes alone, as they are known;
beside anything else it says whom it has found.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from since import since
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from kvcomm_vllm.compat.beside import Neighbours, makers, part_of_report
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import StepReport

pytestmark = since("0.32", "other connectors beside which KV is reused")

NOTES = {"_req_status": {}, "_current_batch_allocated_block_ids": set()}


class Mine(OffloadingConnector):
    """May store what it likes."""


class OurMulti(MultiConnector):
    """May ask whom it likes."""


class Inner(MultiConnector):
    """Finds out who makes it, some calls below where it is made."""

    def __init__(self) -> None:
        self.found = self.find()

    def find(self) -> list[Any]:
        return makers("ours")


class Outer(MultiConnector):
    def __init__(self) -> None:
        self.inner = Inner()


def part(kind: type, **notes: Any) -> Any:
    """A connector of this class that has never been set up, with what its scheduler notes."""
    made = kind.__new__(kind)
    made.connector_scheduler = SimpleNamespace(**(notes or NOTES))
    return made


def beside(
    *others: Any, kinds: tuple[type, ...] = (MultiConnector,), tiers: Any = None, **noted: Any
) -> Neighbours:
    """Ours and these within connectors of ``kinds``, the innermost first."""
    own = SimpleNamespace(config=KVCommConfig.from_mapping({"tiers": tiers or {}}, "test"))
    parents: list[Any] = [kind.__new__(kind) for kind in kinds]
    parents[0]._connectors = [own, *others]
    for name, value in (noted or {"_requests_to_connector": {}}).items():
        setattr(parents[0], name, value)
    return Neighbours(parents, own)


def problem(*others: Any, **given: Any) -> str | None:
    return beside(*others, **given).problem()


def test_who_is_making_ours_is_found_once_each_the_innermost_first() -> None:
    outer = Outer()
    assert outer.inner.found == [outer.inner, outer]
    assert makers("ours") == []


def test_beside_nobody_and_beside_what_is_understood_nothing_is_wrong() -> None:
    assert problem() is None
    assert problem(part(OffloadingConnector)) is None


@pytest.mark.parametrize("kind", [ExampleConnector, Mine])
def test_what_is_not_understood_is_named(kind: type) -> None:
    assert problem(part(OffloadingConnector), part(kind)) == kind.__name__


@pytest.mark.parametrize("kinds", [(OurMulti,), (MultiConnector, MultiConnector)])
def test_a_parent_that_is_not_vllms_only_one_is_named(kinds: tuple[type, ...]) -> None:
    said = "within " + ", ".join(kind.__name__ for kind in kinds)
    assert problem(part(OffloadingConnector), kinds=kinds) == said


def test_our_own_tiers_beside_another_pool_are_named() -> None:
    tiers = {"host_gb": 0.1}
    said = "kvcomm's own tiers and OffloadingConnector"
    assert problem(part(OffloadingConnector), tiers=tiers) == said
    assert problem(tiers=tiers) is None


@pytest.mark.parametrize("lacks", [*NOTES, "_requests_to_connector"])
def test_a_version_that_does_not_note_what_is_asked_for_is_named(lacks: str) -> None:
    other = part(OffloadingConnector, **{name: {} for name in NOTES if name != lacks}, more=1)
    noted = {name: {} for name in ("_requests_to_connector", "more") if name != lacks}
    assert problem(other, **noted) == "OffloadingConnector of a version that is not known"


@pytest.mark.parametrize(("ended", "left"), [(False, []), (True, ["name"])])
def test_pages_of_what_runs_are_named_anew_and_those_of_what_has_ended_keep_their_names(
    ended: bool, left: list[str]
) -> None:
    """They may still be on their way, and are what they were."""
    group = SimpleNamespace(offload_keys=["name"])
    noted = {**NOTES, "_req_status": {"r": SimpleNamespace(group_states=[group])}}
    request: Any = SimpleNamespace(request_id="r", is_finished=lambda: ended)
    beside(part(OffloadingConnector, **noted)).renamed(request)
    assert group.offload_keys == left


def test_our_workers_report_is_found_among_those_of_others_in_any_place() -> None:
    ours = StepReport()
    assert part_of_report(ours, StepReport) is ours
    for said in (("theirs", ours), (ours, None)):
        assert part_of_report(SimpleNamespace(metadata=said), StepReport) is ours
    for nothing in (None, "theirs", SimpleNamespace(metadata=("theirs", None))):
        assert part_of_report(nothing, StepReport) is None
