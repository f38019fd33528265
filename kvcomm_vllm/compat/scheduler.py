# SPDX-License-Identifier: Apache-2.0
"""What vLLM's scheduler has no hook for, or calls otherwise from version to version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# Only loggers below "vllm" have a handler.
logger = init_logger("vllm.kvcomm")


def require_load_before_forward(output: SchedulerOutput) -> None:
    """vLLM 0.29+ runs ``start_load_kv`` before the forward only if this flag is set."""
    if hasattr(output, "has_sync_kv_loads"):
        output.has_sync_kv_loads = True


def recovers_failed_loads(config: VllmConfig) -> bool:
    """Whether vLLM (0.32) computes again what workers have neither loaded nor computed themselves.

    Steps in flight (asynchronous scheduling) and the counters of model runner V2 are ahead of the
    scheduler by then, and are not set back. Workers repair failed loads within the step, so this
    is asked only when that fails as well.
    """
    ahead = config.scheduler_config.async_scheduling or getattr(
        config, "use_v2_model_runner", False
    )
    return not ahead


def is_resting(scheduler: Any | None, engine: Any | None) -> bool:
    """Whether the engine has been paused, put to sleep, or told to end; False where that cannot be
    seen. May be asked before the scheduler is complete.
    """
    paused = bool(getattr(scheduler, "pause_state", 0))
    asleep = bool(getattr(getattr(engine, "model_executor", None), "is_sleeping", False))
    runs = getattr(engine, "is_running", None)  # an engine in the caller's process has none
    return paused or asleep or (runs is not None and not runs())


def drafted_tokens(scheduler: Any | None) -> int:
    """Most tokens that are guessed ahead for a request in one step; 0 where none are."""
    return int(getattr(scheduler, "num_spec_tokens", 0))


def data_parallel_rank(config: VllmConfig) -> int:
    """Which of several engines behind one address this one is; 0 for an engine that is alone.

    vLLM runs engines that need nothing of each other as if each were alone, but for the index.
    """
    parallel = config.parallel_config
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))


def drafted_slots(scheduler: Any | None) -> int:
    """Slots behind those of a step's tokens into which a drafter with layers writes; 0: none."""
    return int(getattr(scheduler, "num_lookahead_tokens", 0))


def weight_version(engine: Any | None) -> str | None:
    """What the weights were called when they were last changed, or None."""
    version = getattr(engine, "get_weight_version", None)
    return None if version is None else str(version())


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


def uncount_hits(scheduler: Any, tokens: int) -> int:
    """Take ``tokens`` that were computed from the hits vLLM has counted for its connector and not
    reported yet; how many are still to be taken, from later ones.
    """
    stats: Any = getattr(scheduler, "connector_prefix_cache_stats", None)
    if stats is None:  # nobody counts
        return 0
    taken = rest = min(tokens, getattr(stats, "hits", 0))
    if taken:
        stats.hits -= taken
    for source, hits in getattr(stats, "hits_by_source", {}).items():
        stats.hits_by_source[source] = hits - min(hits, rest)
        rest -= min(hits, rest)
    return int(tokens - taken)


def hear_before_outputs(scheduler: Any, hear: Callable[[Any], None]) -> None:
    """Let ``hear(worker_meta)`` know what the workers say of a step before vLLM ends its requests.

    vLLM passes that on to its connector last, when it has ended requests and asked for their
    reports: so this scheduler's ``update_from_output`` is wrapped.
    """
    update = scheduler.update_from_output

    @wraps(update)
    def update_from_output(output: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            told = getattr(result, "kv_connector_output", None)
            meta = getattr(told, "kv_connector_worker_meta", None)
            if meta is not None:
                hear(meta)
        except Exception:
            logger.exception("kvcomm: a report may say that what was repaired was reused")
        return update(output, result, *args, **kwargs)

    scheduler.update_from_output = update_from_output


def add_reports(scheduler: Any, tell: Callable[[str], dict[str, Any] | None]) -> None:
    """Let ``tell(request_id)`` add its part of ``kv_transfer_params`` to outputs without it.

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
                    told, given = tell(output.request_id), output.kv_transfer_params
                    if told is not None:  # other connectors have theirs
                        output.kv_transfer_params = {**told, **(given or {})}
        except Exception:
            scheduler.update_from_output = update
            logger.exception("kvcomm: answers that a stop string ends have no report from now on")
        return outputs

    scheduler.update_from_output = update_from_output


def unname_what_is_not_computed(scheduler: Any) -> None:
    """Take the names of pages that a preempted request will not fill.

    vLLM (0.28 - 0.33) names a page when it schedules the step that fills it. Where it preempts the
    request for a more urgent one in that very step (``--scheduling-policy priority``), the page
    keeps the name, and whoever comes next with that prompt reads what nobody has computed: so this
    scheduler's ``_preempt_request`` is wrapped.
    """
    preempt = getattr(scheduler, "_preempt_request", None)
    if preempt is None:
        return

    @wraps(preempt)
    def preempt_request(request: Request, *args: Any, **kwargs: Any) -> Any:
        manager = scheduler.kv_cache_manager
        try:
            computed = request.num_computed_tokens // scheduler.block_size
            tables = manager.get_block_ids(request.request_id)
            manager.evict_blocks({page for table in tables for page in table[computed:]})
        except Exception:
            scheduler._preempt_request = preempt
            logger.exception("kvcomm: pages of preempted requests keep their names from now on")
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = preempt_request


def let_go_before_resets(scheduler: Any, let_go: Callable[[bool], list[Request]]) -> None:
    """Let requests whose KV arrives over several steps begin anew when running requests are reset.

    vLLM sets running requests back, and raises where others wait for their KV.
    ``let_go(reset_running_requests)`` lets go of pages, and returns those that do not run and of
    which nothing is on its way; to vLLM their load has then failed from the first token.
    """
    from vllm.v1.request import RequestStatus

    reset = scheduler.reset_prefix_cache

    @wraps(reset)
    def reset_prefix_cache(reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        for request in let_go(reset_running_requests):
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
