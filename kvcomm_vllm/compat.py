# SPDX-License-Identifier: Apache-2.0
"""Every access to vLLM that may differ between versions or that vLLM offers no interface for
(engine side).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# Only loggers below "vllm" have a handler.
logger = init_logger("vllm.kvcomm")


def _from_the_stack(attribute: str) -> Any | None:
    """The nearest object with a method on the call stack that has this attribute, or None.

    Whoever makes a connector is on the stack of its constructor, and vLLM has no other way to it
    (its pull request 37339 is open).
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if getattr(owner, attribute, None) is not None:
            return owner
        frame = frame.f_back
    return None


def find_model_runner() -> Any | None:
    """The model runner that is just creating this worker's connector, or None."""
    worker = _from_the_stack("model_runner")
    return worker and worker.model_runner


def find_scheduler() -> Any | None:
    """The scheduler that is just creating its connector, or None."""
    return _from_the_stack("update_from_output")


def find_wake_up() -> Callable[[], None] | None:
    """What ends the sleep of the engine that is just creating its scheduler's connector; may be
    called from any thread. None where the engine does not sleep (vLLM's ``LLM`` in this process).
    """
    from vllm.v1.engine import EngineCoreRequestType

    message = getattr(EngineCoreRequestType, "WAKEUP", None)
    engine = _from_the_stack("input_queue")
    if message is None or engine is None:
        return None
    return partial(engine.input_queue.put_nowait, (message, None))


def add_reports(scheduler: Any, tell: Callable[[str], dict[str, Any] | None]) -> None:
    """Let ``tell(request_id)`` add ``kv_transfer_params`` to outputs that have none.

    vLLM asks the connector for them when a request ends in the engine, and has no hook for the
    outputs before: so this scheduler's ``update_from_output`` is wrapped, until anything in here
    fails.
    """
    update = scheduler.update_from_output

    @wraps(update)
    def update_from_output(*args: Any, **kwargs: Any) -> Any:
        outputs = update(*args, **kwargs)
        try:
            for of_client in outputs.values():
                for output in of_client.outputs:
                    told = tell(output.request_id)
                    if told is not None and output.kv_transfer_params is None:
                        output.kv_transfer_params = told
        except Exception:
            scheduler.update_from_output = update
            logger.exception("kvcomm: answers that a stop string ends have no report from now on")
        return outputs

    scheduler.update_from_output = update_from_output


def let_go_before_resets(scheduler: Any, let_go: Callable[[], list[Request]]) -> None:
    """Let requests whose KV arrives over several steps begin anew when running requests are reset.

    vLLM sets running requests back, and raises where others wait for their KV. ``let_go`` returns
    those that do not run and of which nothing is on its way; to vLLM their load has then failed
    from the first token.
    """
    from vllm.v1.request import RequestStatus

    reset = scheduler.reset_prefix_cache

    @wraps(reset)
    def reset_prefix_cache(reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        for request in let_go() if reset_running_requests else []:
            if request.is_finished():
                scheduler._free_blocks(request)
                continue
            request.num_computed_tokens = 0
            scheduler.kv_cache_manager.free(request)
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                scheduler.failed_recving_kv_req_ids.add(request.request_id)
                scheduler.finished_recving_kv_req_ids.add(request.request_id)
        return bool(reset(reset_running_requests, *args, **kwargs))

    scheduler.reset_prefix_cache = reset_prefix_cache


def count_cached_tokens(request: Request, local: int, reused: int) -> None:
    """Correct the count of a prompt's cached tokens that the first output takes to the front end.

    vLLM takes all external tokens for cached ones, also those that were computed between what was
    loaded.
    """
    stats = getattr(request, "prefill_stats", None)
    if stats is None:  # told already
        return
    with suppress(AttributeError, TypeError):  # of another version, with its own idea of them
        stats.set(
            num_prompt_tokens=request.num_prompt_tokens,
            num_local_cached_tokens=local,
            num_external_cached_tokens=reused,
        )


def uncount_hits(scheduler: Any, tokens: int) -> None:
    """Take ``tokens`` that were computed from the hits vLLM has counted for its connector in the
    step it is just scheduling.
    """
    stats: Any = getattr(scheduler, "connector_prefix_cache_stats", None)
    if not 0 < tokens <= getattr(stats, "hits", 0):
        return
    stats.hits -= tokens
    for source, hits in getattr(stats, "hits_by_source", {}).items():
        if hits >= tokens:
            stats.hits_by_source[source] = hits - tokens
            break


def find_engine() -> Any | None:
    """The engine core that is just creating its scheduler's connector, or None."""
    return _from_the_stack("model_executor")


def is_resting(scheduler: Any | None, engine: Any | None) -> bool:
    """Whether the engine has been paused, put to sleep, or told to end; False where that cannot be
    seen. May be asked before the scheduler is complete.
    """
    paused = bool(getattr(scheduler, "pause_state", 0))
    asleep = bool(getattr(getattr(engine, "model_executor", None), "is_sleeping", False))
    runs = getattr(engine, "is_running", None)  # an engine in the caller's process has none
    return paused or asleep or (runs is not None and not runs())


def weight_version(engine: Any | None) -> str | None:
    """What the weights were called when they were last changed (vLLM 0.32+), or None."""
    version = getattr(engine, "get_weight_version", None)
    return None if version is None else str(version())


def prefix_cache(pool: BlockPool) -> Any | None:
    """The pool's table of cached pages. A reset puts a new one in its place, and tells nobody."""
    return getattr(pool, "cached_block_hash_to_block", None)


def require_load_before_forward(output: SchedulerOutput) -> None:
    """vLLM 0.30+ runs ``start_load_kv`` before the forward only if this flag is set."""
    if hasattr(output, "has_sync_kv_loads"):
        output.has_sync_kv_loads = True


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """Layer name -> attention layer of this rank, in model order."""
    return dict(config.compilation_config.static_forward_context)


def cpu_isa(layer: Any) -> str:
    """Instruction set the CPU backend packs pages for; set on layers by its metadata builder."""
    return str(getattr(layer, "isa", ""))


def metadata_builders(runner: Any, private: bool) -> list[tuple[Any, list[str]]]:
    """One metadata builder per attention group and the layers it serves.

    Args:
        private: make own ones. CUDA builders keep state of the step whose metadata is already built
            (FlashAttention's scheduler buffer under full graphs, FlashInfer's planned wrapper),
            which a second use would destroy.
    """
    found = []
    for groups in runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()
            if private:
                spec = group.kv_cache_spec
                builder = type(builder)(spec, group.layer_names, runner.vllm_config, runner.device)
            found.append((builder, group.layer_names))
    return found


def allow_amx() -> None:
    """Ask Linux for the tile registers that vLLM's CPU attention uses (``amx`` pages).

    A process that uses them unasked is killed (SIGILL). vLLM leaves the asking to the first large
    bf16 product; our check at start may come before it.
    """
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)
    if ask is not None:
        ask()


def forwards_embeddings(model: ModelConfig) -> bool:
    """Whether vLLM embeds tokens before it calls the model, text alone included."""
    return bool(model.enable_prompt_embeds or model.supports_multimodal_inputs)


def recovers_failed_loads(config: VllmConfig) -> bool:
    """Whether vLLM (0.32) computes again what a load did not bring.

    Steps in flight (asynchronous scheduling) and the counters of model runner V2 are ahead of the
    scheduler by then, and are not set back.
    """
    ahead = config.scheduler_config.async_scheduling or getattr(
        config, "use_v2_model_runner", False
    )
    return not ahead


def common_metadata(**fields: Any) -> Any:
    """``CommonAttentionMetadata`` from the fields this vLLM version knows."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**{k: v for k, v in fields.items() if k in known})


@contextmanager
def forward_context(
    metadata: dict[str, Any], config: VllmConfig, tokens: int, slots: torch.Tensor, eager: bool
) -> Iterator[None]:
    """vLLM's forward context for one extra forward outside CUDA graphs; ``eager``: outside compiled
    code, too.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    with set_forward_context(
        metadata,
        config,
        num_tokens=tokens,
        slot_mapping=dict.fromkeys(metadata, slots),
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        skip_compiled=eager,
    ):
        yield


def write_kv(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """The backend's own write: ``key``, ``value`` ``[tokens, kv_heads, head_dim]`` into slots,
    packed and quantised.
    """
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)


def name_partial_page(pool: BlockPool, block_id: int, name: bytes, tokens: int) -> bool:
    """Give a page that is not full a name in vLLM's prefix cache, so that it can be looked up, and
    is evicted, like any other; False where that is not possible.

    vLLM names full pages alone. Nobody but who knows ``name`` finds this one.
    """
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    block = pool.blocks[block_id]
    if block.is_null or block.block_hash is not None:
        return False
    key = make_block_hash_with_group_id(BlockHash(name), 0)
    if hasattr(pool, "_insert_block_hash"):  # vLLM 0.32+
        pool._insert_block_hash(key, block, num_tokens=tokens)
    else:
        block.block_hash = key
        pool.cached_block_hash_to_block.insert(key, block)
    return True


def let_vllm_scan_llvmlite() -> None:
    """Keep an engine startable in a process where numba has been used.

    vLLM's CPU worker looks at ``vars()`` of everything in every module; llvmlite's library object
    answers any attribute name, ``__dict__`` included, with a function, on which that scan fails.
    Seen with vLLM 0.32 and llvmlite 0.47.
    """
    from llvmlite.binding import ffi

    answer_any = ffi._lib_wrapper.__getattr__
    if answer_any.__module__ != ffi.__name__:
        return  # done before

    def answer_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer_any(self, name)

    ffi._lib_wrapper.__getattr__ = answer_functions
