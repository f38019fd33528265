# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with our connector, and a worker that only keeps account of its pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from partial_pages import watch_partial_pages
from plugin_settings import transfer_config
from simulated_drafter import NOTHING, Guessed, SimulatedDrafter, speculative
from simulated_memory import Row, Text
from simulated_worker import Served, SimulatedWorker
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    LoRAConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvcomm_vllm.connector import KVCommConnector
from kvcomm_vllm.messages import StepMessage, WorkerFacts
from kvcomm_vllm.scheduler.half import SchedulerHalf
from kvcomm_vllm.scheduler.tiers.pool import HostPool

HEADS: dict[str, Any] = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}


@dataclass
class Job:
    """One scheduled step, as it goes to the workers."""

    output: SchedulerOutput
    new_pages: list[int]
    rows: list[Row]
    samples: list[list[int]]
    result: ModelRunnerOutput | None = None
    guessed: dict[str, Guessed] = field(default_factory=dict)
    guesses: dict[str, list[int]] = field(default_factory=dict)  # for the next step


class EngineWithoutWorker(SimulatedWorker):
    """Steps the scheduler and simulates the workers.

    Args:
        model: any small model config; nothing of it is loaded.
        settings: changes to ``SETTINGS``; None for plain vLLM without a connector.
        pipeline: steps in flight; 2 is vLLM's asynchronous scheduling.
        placeholders: placeholders whose anchors fit into the workers' arenas.
        paper_rows: tokens that mode paper can keep there.
        compares: the model tells which token follows.
        events: what is in the prefix cache is published, into ``published``.
        loras: adapters that one step can have; 0 for an engine without.
        drafts: tokens guessed ahead for a request in one step, by speculative decoding.
        layered: by which method, if it is one with layers.
    """

    connector_name = "kvcomm"
    learns = True

    def __init__(
        self,
        model: ModelConfig,
        settings: dict[str, Any] | None,
        block_size: int = 4,
        num_blocks: int = 64,
        budget: int = 256,
        max_num_seqs: int = 8,
        policy: str = "fcfs",
        pipeline: int = 1,
        placeholders: int = 8,
        paper_rows: int = 4096,
        compares: bool = True,
        events: bool = False,
        loras: int = 0,
        drafts: int = 0,
        layered: str | None = None,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.drafter = SimulatedDrafter(drafts)
        config = VllmConfig(
            model_config=model,
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_model_len=model.max_model_len,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                policy=policy,
            ),
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=None if settings is None else self.transfer_config(settings),
            lora_config=LoRAConfig(max_loras=loras) if loras else None,
            speculative_config=speculative(model, drafts, pipeline > 1, layered),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=events, publisher="null"),
        )
        config.scheduler_config.async_scheduling = pipeline > 1
        config.cache_config.num_gpu_blocks = num_blocks
        init_none_hash(sha256)
        kind = AsyncScheduler if pipeline > 1 else Scheduler
        self.scheduler = kind(
            config,
            KVCacheConfig(num_blocks, [], self._groups(block_size)),
            StructuredOutputManager(config),
            block_size=block_size,
        )
        self.published: list[Any] = []
        if events:
            publisher = self.scheduler.kv_event_publisher
            publisher.publish = lambda batch: self.published.extend(batch.events)
        self.pipeline = pipeline
        self.hasher = get_request_block_hasher(block_size, sha256)
        self.exact_pages: dict[bytes, tuple[Text, int]] = {}  # hash in vLLM's sense -> its content
        self.after_step: Callable[[EngineWithoutWorker], None] = lambda engine: None
        self.jobs: deque[Job] = deque()
        self.trace: list[dict[str, tuple[int, list[int]]]] = []
        self._new_pages: list[int] = []
        self._watch_allocations()
        self.partial_names: set[bytes] = set()
        if self.scheduler.connector is not None:
            rooms = {"anchor": placeholders, "paper": paper_rows}
            facts = WorkerFacts(None, "", "test", rooms=rooms, compares=compares, pool=True)
            facts.alone = self.learns
            self.scheduler.connector.set_xfer_handshake_metadata({0: facts})
            watch_partial_pages(self.half.pages, self.partial_names)
            if isinstance(self.half.tiers, HostPool):  # nothing is computed here, at no cost
                self.half.tiers._costs.step = lambda *_, **__: None  # type: ignore[method-assign]

    def transfer_config(self, settings: dict[str, Any]) -> KVTransferConfig:
        return transfer_config(settings, self.connector_name)

    def _groups(self, block_size: int) -> list[KVCacheGroupSpec]:
        return [KVCacheGroupSpec(["layer"], FullAttentionSpec(block_size=block_size, **HEADS))]

    @property
    def connector(self) -> KVCommConnector:
        assert isinstance(self.scheduler.connector, KVCommConnector)
        return self.scheduler.connector

    has_others = False  # other connectors beside ours

    @property
    def others_load(self) -> bool:
        """Whether another connector has KV of a request on its way."""
        return False

    @property
    def half(self) -> SchedulerHalf:
        return self.connector._scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def _watch_allocations(self) -> None:
        allocate = self.pool.get_new_blocks

        def watched(count: int, **kwargs: Any) -> Any:
            blocks = allocate(count, **kwargs)
            self._new_pages.extend(block.block_id for block in blocks)
            return blocks

        self.pool.get_new_blocks = watched

    # ---- requests --------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        prompt: list[int],
        answer: list[int] | None = None,
        hints: object = None,
        salt: str | None = None,
        priority: int = 0,
        resumable: bool = False,
        adapter: LoRARequest | None = None,
        **sampling: Any,
    ) -> Request:
        """A request that will sample ``answer`` (default: 2 tokens) and then end."""
        answer = [1, 1] if answer is None else answer
        number = adapter.lora_int_id if adapter else 0
        beyond = [0] * (2 + 3 * self.drafter.most)  # steps in flight may sample beyond the end
        text = Text.of([*prompt, *answer, *beyond], number)
        params = SamplingParams(
            max_tokens=len(answer),
            temperature=0.0,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"kvcomm": hints}} if hints is not None else None,
            **sampling,
        )
        params.skip_reading_prefix_cache = params.prompt_logprobs is not None
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            cache_salt=salt,
            priority=priority,
            arrival_time=float(len(self.served)),
            block_hasher=self.hasher,
            resumable=resumable,
            lora_request=adapter,
        )
        self.served[name] = Served(text, len(prompt))
        self._note_exact_hashes(text, salt, adapter)
        self.scheduler.add_request(request)
        return request

    def _note_exact_hashes(self, text: Text, salt: str | None, adapter: LoRARequest | None) -> None:
        plain = Request(
            request_id="plain",
            prompt_token_ids=text.tokens.tolist(),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=self.hasher,
            lora_request=adapter,
        )
        for index, block_hash in enumerate(plain.block_hashes):
            self.exact_pages[bytes(block_hash)] = (text, index)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def serve(
        self, name: str, prompt: list[int], answer: list[int] | None = None, **options: Any
    ) -> Served:
        """Add one request and run it to its end."""
        self.add(name, prompt, answer, **options)
        self.run(name)
        return self.served[name]

    def run(self, *names: str, steps: int = 500) -> None:
        """Step until these requests (all, by default) have ended."""
        for _ in range(steps):
            wanted = names or tuple(self.served)
            if all(name not in self.scheduler.requests for name in wanted):
                self.drain()
                return
            self.step()
        raise AssertionError(f"not finished after {steps} steps: {list(self.scheduler.requests)}")

    def rest(self, steps: int = 2000) -> None:
        """Step until the scheduler wants no more: all has ended, or it is paused."""
        for _ in range(steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"no rest after {steps} steps: {list(self.scheduler.requests)}")

    # ---- one step --------------------------------------------------------------------------------

    def step(self) -> SchedulerOutput:
        """Schedule and execute one step; take back the one that leaves the pipeline."""
        output = self.schedule()
        while len(self.jobs) >= self.pipeline:
            self.take_back()
        self.after_step(self)
        return output

    def drain(self) -> None:
        while self.jobs:
            self.take_back()

    def schedule(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        new_pages, self._new_pages = self._new_pages, []
        job = Job(output, new_pages, [], [])
        seen = {}
        for name, count in output.num_scheduled_tokens.items():
            table = list(self.scheduler.kv_cache_manager.get_block_ids(name)[0])
            self._take(name, count, table, job)
            seen[name] = (count, table)
        self.trace.append(seen)
        self._execute(job)
        self.jobs.append(job)
        return output

    def _take(self, name: str, count: int, table: list[int], job: Job) -> None:
        """One request's part of a step: what is computed, what follows, and what may follow that.

        Steps in flight are ahead of the scheduler, which takes their guesses for right until it
        hears of them.
        """
        request, text = self.scheduler.requests[name], self.served[name].text
        before = [one.guessed[name] for one in self.jobs if name in one.guessed]
        ahead = sum(one.wrong for one in before if one.preemptions == request.num_preemptions)
        end = request.num_computed_tokens - ahead
        tokens = self._guesses(name, job.output)
        known = end - len(tokens)
        guessed = self.drafter.judge(text, known, tokens, request.num_preemptions)
        computed = text.with_guesses(known, tokens) if tokens else text
        job.rows.append(Row(name, computed, table, end - count, end))
        follows = known + guessed.right + 1
        ends = not request.is_prefill_chunk
        job.samples.append(text.tokens[known:follows].tolist() if ends else [])
        job.guessed[name] = guessed
        job.guesses[name] = self.drafter.guess(text, follows) if ends else []

    def _guesses(self, name: str, output: SchedulerOutput) -> list[int]:
        """The guesses that this step computes; with steps in flight the scheduler only knows how
        many are wanted, and workers have those of the step before.
        """
        wanted = output.scheduled_spec_decode_tokens.get(name, [])
        if self.pipeline == 1:
            return list(wanted)
        known = self.jobs[-1].guesses.get(name, []) if self.jobs else []
        return [*known, *[NOTHING] * len(wanted)][: len(wanted)]

    def _execute(self, job: Job) -> None:
        memory = self.memory
        memory.garbage = False
        connector_output = None
        message = job.output.kv_connector_metadata
        if isinstance(message, StepMessage):
            self.host_pool.work(message.transfers, message.awaited)
        if job.rows:
            most = self.scheduler.lora_config.max_loras if self.scheduler.lora_config else 0
            in_use = {row.text.adapter for row in job.rows} - {0}
            assert len(in_use) <= most, "more adapters in a step than there are slots"
        memory.forget(job.new_pages)
        if isinstance(message, StepMessage):
            if message.requests:
                before = getattr(job.output, "has_sync_kv_loads", True)  # vLLM 0.28: always
                assert before, "loads must run before the forward"
            if message.lesson is not None:
                busy = job.output.total_num_scheduled_tokens or message.requests
                assert not busy, "lessons are for idle steps"
            tables = {row.request_id: row.table for row in job.rows}
            connector_output = self.work(message, tables, self.half.lessons._active)
        memory.forward(job.rows, "forward")
        connector_output = self.transfer(connector_output)
        names = [row.request_id for row in job.rows]
        job.result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=job.samples,
            kv_connector_output=connector_output,
        )

    def idle(self, steps: int = 1000) -> None:
        """Step as vLLM's loop does while no request is left: what a step in flight brings back may
        be the reason for one more.
        """
        for _ in range(steps):
            if not self.scheduler.has_requests():
                if not self.jobs:
                    return
                self.drain()
                continue
            self.step()
        self.drain()

    def take_back(self) -> None:
        """The oldest step in flight returns to the scheduler."""
        job = self.jobs.popleft()
        assert job.result is not None
        outputs = self.scheduler.update_from_output(job.output, job.result)
        for client in outputs.values():
            for output in client.outputs:
                served = self.served[output.request_id]
                served.outputs.append(output)
                if output.finish_reason is not None:
                    served.finished = True
                    served.report = (output.kv_transfer_params or {}).get("kvcomm", {})
        if self.drafter.most and self.pipeline == 1:
            guesses = DraftTokenIds(list(job.guesses), list(job.guesses.values()))
            self.scheduler.update_draft_token_ids(guesses)
