# SPDX-License-Identifier: Apache-2.0
"""A server in thought: the real scheduler half decides, and nobody computes anything.

Requests come one after another, and every load succeeds. Nothing is learned, so all
placeholders are cold: mode ``anchor`` is served as mode ``seam``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.estimate.losses import Loss, Losses
from kvcomm_vllm.estimate.pool import Pages, Requests
from kvcomm_vllm.messages import StepReport
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.half import SchedulerHalf
from kvcomm_vllm.scheduler.index import I32

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

ATTEMPTS = 4  # a request is asked about at most twice: its own conversation's pages come first
ALL_AT_ONCE = 1 << 40  # tokens per step: in how many steps a plan is carried out changes no count


@dataclass(frozen=True)
class Prompt:
    """One request as it would reach an engine.

    Args:
        answer: what was generated, where the log says so.
        hints: the body's ``kv_transfer_params``.
        scored: it asks for log-probabilities of its prompt.
    """

    tokens: I32
    answer: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    salt: str | None = None
    hints: Mapping[str, object] | None = None
    scored: bool = False


@dataclass(frozen=True)
class Served:
    """How a prompt was treated.

    Args:
        prefix_alone: tokens that vLLM's prefix cache would hit on a server without the plugin.
        losses: why its computed tokens are computed.
    """

    prompt_tokens: int
    prefix_alone: int
    local: int
    reused: int
    computed: int
    declined: str | None
    losses: list[Loss]
    spans: list[tuple[int, int, str]]


class TooLongError(ValueError):
    """A request that does not fit into the cache."""


class RefusedError(ValueError):
    """A request that vLLM itself refuses; the message is vLLM's."""


class ServerInThought:
    """Args:
    config: the plugin's settings.
    cache_tokens: KV that fits into the engine's memory; vLLM logs it at start.
    block_size: tokens per page.
    explain: look for text that is stored in another rendering.
    """

    def __init__(
        self, config: KVCommConfig, cache_tokens: int, block_size: int, explain: bool = True
    ) -> None:
        blocks = max(1, cache_tokens // block_size)
        self.capacity = blocks * block_size
        self.requests = Requests(block_size)
        self.alone = Pages(blocks, block_size)
        self.pages = Pages(blocks, block_size)
        self.half = SchedulerHalf(config, block_size, ALL_AT_ONCE, None, EngineState())
        self.half.bind_pool(self.pages.pool)
        self.losses = Losses(self.half, explain)

    def serve(self, prompt: Prompt) -> Served:
        """Serve a request to its end.

        Raises:
            RefusedError: vLLM would not take it.
            TooLongError: it is longer than the cache.
        """
        if len(prompt.tokens) + max(1, len(prompt.answer)) > self.capacity:
            raise TooLongError
        try:
            twin, request = self._request(prompt), self._request(prompt)
        except Exception as error:  # its class differs between versions of vLLM
            raise RefusedError(str(error)) from None
        alone = self._alone(twin, prompt.answer)
        self.half.on_new_request(request)
        state = self.half.states[request.request_id]
        hit, external = self._match(request)
        losses = self.losses.of(state, len(hit) * self.pages.block_size)
        blocks = self.pages.take(request, hit)
        self._prefill(request, blocks, len(hit) * self.pages.block_size, external)
        report = state.report()
        _decode(request, blocks, prompt.answer, self.pages)
        request.status = RequestStatus.FINISHED_STOPPED
        self.half.finish(request, [block.block_id for block in blocks])
        self.pages.free(blocks)
        self.losses.seen.add(state.namespace, state.tokens())
        return Served(
            prompt_tokens=report["prompt_tokens"],
            prefix_alone=alone,
            local=report["local"],
            reused=report["reused"],
            computed=report["computed"],
            declined=next(iter(report["declined"]), None),
            losses=losses,
            spans=[(start, end, kind) for start, end, kind in report["spans"]],
        )

    def _alone(self, request: Request, answer: I32) -> int:
        """The same without the plugin."""
        hit = self.alone.hit(request)
        blocks = self.alone.take(request, hit)
        _decode(request, blocks, answer, self.alone)
        self.alone.free(blocks)
        return len(hit) * self.alone.block_size

    def _request(self, prompt: Prompt) -> Request:
        tokens = prompt.tokens.tolist()
        return self.requests.make(tokens, prompt.salt, prompt.hints, prompt.scored)

    def _match(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """The local hit and what the plugin adds, as vLLM's scheduler asks for them."""
        for _ in range(ATTEMPTS):
            hit = self.pages.hit(request)
            external, _ = self.half.match(request, len(hit) * self.pages.block_size)
            if external is not None:
                return hit, external
            self._step({})
        raise AssertionError("nobody else runs that it could wait for")

    def _prefill(
        self, request: Request, blocks: list[KVCacheBlock], local: int, external: int
    ) -> None:
        self.half.admit(request, [block.block_id for block in blocks], external)
        request.num_computed_tokens = local + external
        self._step({request.request_id: request.num_tokens - request.num_computed_tokens})
        request.num_computed_tokens = request.num_tokens
        loaded = {request.request_id} if external else set()
        self.half.on_report(StepReport(done=loaded), set())

    def _step(self, scheduled: dict[str, int]) -> None:
        output: Any = SimpleNamespace(
            num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values())
        )
        self.half.build_message(output)


def _decode(request: Request, blocks: list[KVCacheBlock], answer: I32, pages: Pages) -> None:
    """The answer; of one that is not known the first token, which has no KV yet, stands for it."""
    request.append_output_token_ids(answer.tolist() or [0])
    request.num_computed_tokens = request.num_tokens - 1
    pages.grow(request, blocks, request.num_computed_tokens)
