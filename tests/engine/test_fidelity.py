# SPDX-License-Identifier: Apache-2.0
"""On a real model, answers with reused KV stay as close to dense ones as the README says."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared/data/gsm8k.jsonl"

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def fidelity() -> Iterator[ModuleType]:
    """The benchmark that users run, as a module; what it sets in the environment goes with it."""
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "benchmarks/fidelity.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fidelity"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        spec.loader.exec_module(module)
        yield module


def test_seams_keep_a_real_model_within_the_promised_distance_of_dense(
    smollm2: str, fidelity: ModuleType
) -> None:
    """Mean KL over 24 greedy tokens, three agents on GSM8K, with most of the prompt reused."""
    if GSM8K.exists():
        questions = fidelity.read_questions(GSM8K, 6, skip=20)
    else:  # users have the questions of the demo
        questions = fidelity.read_questions(fidelity.QUESTIONS, 6)
    bench = fidelity.Bench(smollm2)
    try:
        modes = {mode: fidelity.MODES[mode] for mode in ("rotate", "seam 16")}
        scores = fidelity.measure(bench, questions, modes, tokens=24)
    finally:
        bench.llm.llm_engine.engine_core.shutdown()
    assert scores["seam 16"]["reused"] > 0.5
    assert 0 < scores["seam 16"]["kl_mean"] <= 0.02
    assert scores["seam 16"]["kl_mean"] < scores["rotate"]["kl_mean"], "a seam must help"
