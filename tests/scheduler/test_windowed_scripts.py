# SPDX-License-Identifier: Apache-2.0
"""Random agents beside vLLM's hybrid KV cache manager, in a pool that is too small; every step is
checked.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_without_worker import EngineWithoutWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_scripts import Crowd, play, thorough
from windowed_engine import WindowedEngine

Make = Callable[..., WindowedEngine]

pytestmark = pytest.mark.slow


class WindowedCrowd(Crowd):
    """Whose prompts fit into the pool, whatever the windows are."""

    def __init__(self, engine: EngineWithoutWorker, seed: int, failures: bool) -> None:
        super().__init__(engine, seed, failures)
        self.capacity //= len(engine.scheduler.kv_cache_config.kv_cache_groups)


engines = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([4, 8, 16]),
        "num_blocks": st.integers(80, 240),
        "budget": st.sampled_from([16, 48, 128]),
        "max_num_seqs": st.sampled_from([2, 6]),
        "windows": st.sampled_from([(1,), (7,), (8,), (9,), (20, 20), (33,), (5, 40), (500,)]),
    }
)
keys = st.fixed_dictionaries(
    {
        "seam_tokens": st.sampled_from([0, 2, 5]),
        "reuse_approximate": st.booleans(),
        "max_sequences": st.sampled_from([3, 256]),
        "share_inflight_seconds": st.sampled_from([0.0, 60.0]),
        "max_hole_tokens": st.sampled_from([0, 0, 20]),
    }
)


@settings(thorough, max_examples=8)
@given(options=engines, given_keys=keys, seed=st.integers(0, 2**32))
def test_no_script_reads_what_was_not_written_in_any_group(
    make_windowed: Make, options: dict[str, object], given_keys: dict[str, object], seed: int
) -> None:
    play(make_windowed(given_keys, **options), seed, steps=150, crowd=WindowedCrowd)


@settings(thorough, max_examples=6)
@given(options=engines, given_keys=keys, seed=st.integers(0, 2**32))
def test_two_steps_in_flight_keep_their_order_in_all_groups(
    make_windowed: Make, options: dict[str, object], given_keys: dict[str, object], seed: int
) -> None:
    play(make_windowed(given_keys, **options, pipeline=2), seed, steps=150, crowd=WindowedCrowd)


@settings(thorough, max_examples=6)
@given(options=engines, given_keys=keys, seed=st.integers(0, 2**32))
def test_loads_that_fail_are_repaired_in_all_groups(
    make_windowed: Make, options: dict[str, object], given_keys: dict[str, object], seed: int
) -> None:
    engine = make_windowed(given_keys, **options)
    engine.break_load = lambda ops: hash((seed, ops.request_id)) % 4 == 0
    play(engine, seed, steps=150, crowd=WindowedCrowd)


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_with_room_reuses_most_of_what_is_shared(make_windowed: Make, seed: int) -> None:
    """Guards the other tests here: the crowd really does reuse."""
    engine = make_windowed(num_blocks=1500)
    play(engine, seed, steps=150, crowd=WindowedCrowd)
    reports = [served.report for served in engine.served.values() if served.report]
    assert sum(report["reused"] > 0 for report in reports) > len(reports) / 5
