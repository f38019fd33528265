# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half asks of its tiers, and the answers where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Any, Protocol

from kvcomm_vllm.messages import StepMessage, StepReport
from kvcomm_vllm.scheduler.index import Sequence
from kvcomm_vllm.scheduler.promoted import Promoted
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.tiers.wanted import Wanted


class Tiers(Protocol):
    """Keeps pages beyond the KV cache."""

    @property
    def secret(self) -> bytes | None:
        """Of tenants' digests, where these are to be the same in other engines."""

    def stored(self, sequence: Sequence, block_ids: Listing[int]) -> None:
        """A request has ended; this is kept of it, in these pages."""

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        """Copy pages there that are complete, under their names."""

    def described(self, sequence: Sequence) -> None:
        """All pages of a sequence have other names now, and true KV."""

    def news(self) -> None:
        """Look whether other engines have kept something; asked as requests arrive."""

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        """Bring back the first of these that the request could read and that is not in the KV
        cache; whether it is worth asking again, since pages are on their way.
        """

    def settled(self, request_id: str) -> None:
        """The request has been planned, with what was brought: its plan holds what it reads."""

    def forget(self, request_id: str) -> Promoted | None:
        """The request has ended; what was brought back for it, if anything."""

    def holds(self, sequence: Sequence) -> bool:
        """Whether pages of a sequence lie there, though none may be left in the KV cache."""

    def fill(self, message: StepMessage, tokens: int) -> None:
        """Put into a step's message what is to be copied; it computes so many ``tokens``."""

    def on_report(self, report: StepReport) -> None: ...

    def events(self) -> Iterable[Any]:
        """KV events since this was last asked, for vLLM to publish."""

    def due(self) -> bool:
        """Whether vLLM's loop is to go on although no request is left."""

    def let_go(self) -> None:
        """An operator resets the KV cache: no page is held any more."""

    def clear(self) -> None:
        """Weights or caches were reset: nothing that is kept may be read any more."""

    def close(self) -> None:
        """The engine ends."""


class NoTiers:
    """The KV cache is all there is."""

    secret: bytes | None = None

    def stored(self, sequence: Sequence, block_ids: Listing[int]) -> None:
        pass

    def keep(self, names: Listing[bytes], block_ids: Listing[int]) -> None:
        pass

    def described(self, sequence: Sequence) -> None:
        pass

    def news(self) -> None:
        pass

    def bring(self, state: RequestState, wanted: Iterable[Wanted]) -> bool:
        return False

    def settled(self, request_id: str) -> None:
        pass

    def forget(self, request_id: str) -> Promoted | None:
        return None

    def holds(self, sequence: Sequence) -> bool:
        return False

    def fill(self, message: StepMessage, tokens: int) -> None:
        pass

    def on_report(self, report: StepReport) -> None:
        pass

    def events(self) -> Iterable[Any]:
        return ()

    def due(self) -> bool:
        return False

    def let_go(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass
