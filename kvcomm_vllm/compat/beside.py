# SPDX-License-Identifier: Apache-2.0
"""The other connectors of the ``MultiConnector`` that has made ours (vLLM 0.32).

vLLM asks its parts in the order in which they are listed. The first one that has something for a
request loads it, all others are told of its pages and of no tokens; all may store what they like.
What they have no hook for is looked up on them, or wrapped on that one ``MultiConnector``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvcomm_vllm.guards.connectors import TIERS, is_understood
from kvcomm_vllm.messages import SharedHandshake

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# What an ``OffloadingConnector`` keeps of requests and of pages.
_KEPT = ("_req_status", "_current_batch_allocated_block_ids")


def makers(own: Any) -> list[Any]:
    """The connectors that are just making ``own`` for themselves, the innermost first."""
    found: list[Any] = []
    frame = inspect.currentframe()
    while frame is not None:
        maker = frame.f_locals.get("self")
        if isinstance(maker, KVConnectorBase_V1) and maker is not own and maker not in found:
            found.append(maker)
        frame = frame.f_back
    return found


class Alone:
    """Nobody is beside us."""

    def problem(self) -> str | None:
        """Why nothing may be reused beside them, or None."""
        return None

    @property
    def said(self) -> str:
        """Who they are, for the line that says that reuse is on."""
        return ""

    def join(
        self, begin: Callable[[Request, int], None], supplied: Callable[[Request, int], None]
    ) -> None:
        """Reuse is on: from now on we hear what becomes of a request.

        Args:
            begin: is told before anybody is asked, with the request and its local hit.
            supplied: is told how many tokens another connector loads.
        """

    def supplies(self, request: Request) -> bool:
        """Whether one that is asked before us loads for the request, which we are just asked
        about.
        """
        return False

    def renamed(self, request: Request) -> None:
        """The block hashes of a request have changed: what they know of them is past."""

    def written(self, block_ids: list[int]) -> None:
        """We write to these pages in this step, which may hold what somebody still has to store."""

    def storing(self, output: SchedulerOutput) -> bool:
        """Whether pages that are free may still hold what somebody has to store."""
        return False

    def forget(self) -> None:
        """What was to be loaded into pages is not there: nothing that was stored of them holds."""


class Neighbours(Alone):
    """The other parts of the ``MultiConnector`` that is ``parents[0]``.

    Args:
        parents: see :func:`makers`; not empty.
        own: ours.
    """

    def __init__(self, parents: list[Any], own: Any) -> None:
        self._parents = parents
        self._parent = parents[0]
        self._own = own
        self._joined = False

    @property
    def _others(self) -> list[Any]:
        """Complete when all parts have been made."""
        return [part for part in getattr(self._parent, "_connectors", ()) if part is not self._own]

    @property
    def _names(self) -> str:
        return ", ".join(type(other).__name__ for other in self._others)

    @property
    def said(self) -> str:
        return f", beside {self._names}" if self._others else ""

    def problem(self) -> str | None:
        from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

        if len(self._parents) > 1 or type(self._parent) is not MultiConnector:
            return "within " + ", ".join(type(parent).__name__ for parent in self._parents)
        unknown = [other for other in self._others if not is_understood(type(other))]
        if unknown:
            return ", ".join(type(other).__name__ for other in unknown)
        if not self._others:
            return None
        if self._own.config.tiers.wanted:
            return f"{TIERS} and {self._names}"
        schedulers = [other.connector_scheduler for other in self._others]
        known = hasattr(self._parent, "_requests_to_connector") and all(
            hasattr(one, name) for one in schedulers for name in _KEPT
        )
        return None if known else f"{self._names} of a version that is not known"

    def join(
        self, begin: Callable[[Request, int], None], supplied: Callable[[Request, int], None]
    ) -> None:
        parent, own = self._parent, self._own
        ask = parent.get_num_new_matched_tokens

        @wraps(ask)
        def get_num_new_matched_tokens(request: Request, computed: int) -> tuple[int | None, bool]:
            chosen = parent._requests_to_connector
            chosen.pop(request.request_id, None)  # by an attempt that came to nothing
            begin(request, computed)
            tokens, later = ask(request, computed)
            winner = chosen.get(request.request_id)
            if tokens and winner is not None and parent._connectors[winner] is not own:
                supplied(request, tokens)
            return tokens, later

        parent.get_num_new_matched_tokens = get_num_new_matched_tokens
        self._joined = True

    def supplies(self, request: Request) -> bool:
        return self._joined and request.request_id in self._parent._requests_to_connector

    def renamed(self, request: Request) -> None:
        """It names each chunk of a request once, which would be the old name for ever."""
        if request.is_finished():  # what has been stored of it keeps its names
            return
        for other in self._others:
            status = other.connector_scheduler._req_status.get(request.request_id)
            for group in status.group_states if status else ():
                group.offload_keys.clear()

    def written(self, block_ids: list[int]) -> None:
        """Copies from these pages are waited for, as if the request had been scheduled."""
        for other in self._others:
            other.connector_scheduler._current_batch_allocated_block_ids.update(block_ids)

    def storing(self, output: SchedulerOutput) -> bool:
        return bool(output.finished_req_ids) or any(
            other.has_pending_push_work() for other in self._others
        )

    def forget(self) -> None:
        for other in self._others:
            other.reset_cache()


def share_handshakes(parents: list[Any], own: Any) -> None:
    """Let the workers' word reach the part it is for: of all parts', vLLM takes the first one that
    has any, and tells it to all.
    """
    if not parents or not hasattr(parents[0], "_connectors"):
        return
    parent = parents[0]

    def get_handshake_metadata() -> SharedHandshake:
        others = (one.get_handshake_metadata() for one in parent._connectors if one is not own)
        theirs = next((said for said in others if said is not None), None)
        return SharedHandshake(own.get_handshake_metadata(), theirs)

    def hand_on(name: str) -> Callable[[dict[Any, Any]], None]:
        def set_metadata(metadata: dict[Any, Any]) -> None:
            for part in parent._connectors:
                said = {rank: _part_of(one, part is own) for rank, one in metadata.items()}
                getattr(part, name)({rank: one for rank, one in said.items() if one is not None})

        return set_metadata

    parent.get_handshake_metadata = get_handshake_metadata
    for name in ("set_xfer_handshake_metadata", "set_xfer_handshake_metadata_pp_aware"):
        if hasattr(parent, name):
            setattr(parent, name, hand_on(name))


def _part_of(metadata: Any, ours: bool) -> Any:
    if not isinstance(metadata, SharedHandshake):
        return metadata
    return metadata.ours if ours else metadata.theirs


def part_of_report(meta: Any, kind: type) -> Any | None:
    """What workers say of a step to the connector whose reports are of this kind, of what they say
    to a ``MultiConnector``.
    """
    parts = getattr(meta, "metadata", None)
    said = parts if isinstance(parts, tuple) else (meta,)
    return next((one for one in said if isinstance(one, kind)), None)
