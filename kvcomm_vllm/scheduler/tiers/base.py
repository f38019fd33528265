# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half asks of its tiers, and the answers where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Protocol

from kvcomm_vllm.messages import StepReport, TransferOp
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.tiers.wanted import Wanted


class Tiers(Protocol):
    """Keeps pages beyond the KV cache."""

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        """Copy pages there that are complete, under their names. They are held until that is
        done.
        """

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        """Bring back the first of these that the request could read and that is not in the KV
        cache; whether it is worth asking again, since pages are on their way.
        """

    def settled(self, request_id: str) -> None:
        """The request has been planned, with what was brought: its plan holds what it reads."""

    def forget(self, request_id: str) -> None:
        """The request has ended."""

    def holds(self, sequence: Sequence) -> bool:
        """Whether pages of a sequence lie there, though none may be left in the KV cache."""

    def take_ops(self) -> list[TransferOp]:
        """What is to go out with this step."""

    def on_report(self, report: StepReport) -> None: ...

    def due(self) -> bool:
        """Whether vLLM's loop is to go on although no request is left."""

    def clear(self) -> None:
        """Weights or caches were reset: nothing that is kept may be read any more."""

    def close(self) -> None:
        """The engine ends."""


class NoTiers:
    """The KV cache is all there is."""

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        pass

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        return False

    def settled(self, request_id: str) -> None:
        pass

    def forget(self, request_id: str) -> None:
        pass

    def holds(self, sequence: Sequence) -> bool:
        return False

    def take_ops(self) -> list[TransferOp]:
        return []

    def on_report(self, report: StepReport) -> None:
        pass

    def due(self) -> bool:
        return False

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass
