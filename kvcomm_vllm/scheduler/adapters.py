# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters, scheduler side: with which weights a request's KV is computed.

An adapter's name, number and path stay what they are when its weights are replaced: in place, or
because vLLM had dropped it and has read a changed file. Workers see what the weights are, and tell
of it with the step that is the first to have others. Until then nobody is sent what was computed
with one version of an adapter while it has another: a worker computes instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvcomm_vllm.compat.adapters import adapter_names, adapter_number
from kvcomm_vllm.messages import Adapter
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.idle.lesson_queue import LessonQueue
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.store import SequenceStore

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.kvcomm")


class Adapters:
    """How often adapters' weights were replaced, as far as workers have told.

    Args:
        states: of all requests that are alive, by their ids.
        store, pages, lessons: what has to forget.
    """

    def __init__(
        self,
        states: dict[str, RequestState],
        store: SequenceStore,
        pages: SourcePages,
        lessons: LessonQueue,
    ) -> None:
        self._states = states
        self._store = store
        self._pages = pages
        self._lessons = lessons
        self._versions: dict[int, int] = {}
        self._newest: dict[tuple[str, str], int] = {}  # numbers by name and path

    def of(self, request: Request) -> Adapter | None:
        """The request's adapter as it is now.

        An adapter that was unloaded and loaded again has a new number. Its files may be others by
        then, and vLLM goes by name and path: it would find pages of the old one.
        """
        names = adapter_names(request)
        if names is None:
            return None
        number = adapter_number(request)
        before = self._newest.setdefault(names, number)
        if number > before:
            self._newest[names] = number
            self._store.forget_adapter(before, self._pages)
        return Adapter(number, self._versions.get(number, 0))

    def hear(self, versions: dict[int, int]) -> None:
        """Workers tell of new versions. To be called before requests of that step end: none of them
        may be stored as if it had the old one. May be told twice.
        """
        for number, version in versions.items():
            if self._versions.get(number) != version:
                self._versions[number] = version
                self._forget(number)

    def _forget(self, number: int) -> None:
        """What was computed with its old weights is met no more, and requests that may have KV of
        both are left alone.

        vLLM itself goes on serving pages of the old weights where name and path are the same: those
        that are known are taken out of its prefix cache.
        """
        logger.info("kvcomm: adapter %d has other weights, what it had computed is gone", number)
        self._store.forget_adapter(number, self._pages)
        self._lessons.forget_adapter(number)
        for state in self._states.values():
            if state.adapter is not None and state.adapter.number == number:
                self._store.drop(state)
                state.withdraw(Reason.ADAPTER_REPLACED)
