# SPDX-License-Identifier: Apache-2.0
"""On a real model, answers with reused KV stay as close to dense ones as the README says."""

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.measure import measure
from kvcomm_vllm.evaluation.fidelity.report import summarise, write_json
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.workloads import math
from kvcomm_vllm.evaluation.workloads.case import Case, Turn
from kvcomm_vllm.evaluation.workloads.data_set import BESIDE
from kvcomm_vllm.evaluation.workloads.rows import read_file, read_sample

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]

MODES = [("rotate", 0), ("seam16", 0)]


@pytest.fixture(scope="module")
def bench(smollm2: str) -> Iterator[Bench]:
    bench = Bench(smollm2)
    yield bench
    bench.close()


def test_seams_keep_a_real_model_within_the_promised_distance_of_dense(bench: Bench) -> None:
    """Mean KL over 24 greedy tokens, three agents on GSM8K, with most of the prompt reused."""
    if (BESIDE / "gsm8k.jsonl").exists():
        rows = read_file(BESIDE / "gsm8k.jsonl", {"question": str})[20:26]
    else:  # users have the questions of the demo
        rows = read_sample("questions.jsonl", {"question": str})[:6]
    cases = [case for row in rows for case in math.solve(row, random.Random(0), agents=3)]
    study = Study("gsm8k3", "questions", cases, [])
    rotate, seam = summarise(measure(bench, study, MODES, tokens=24))
    assert seam.reused > 0.5
    assert 0 < seam.kl_mean <= 0.02
    assert seam.kl_mean < rotate.kl_mean, "a seam must help"


def test_the_same_prompts_give_the_same_numbers(bench: Bench, tmp_path: Path) -> None:
    """Also in an engine that has served them before."""
    note = "The parcel from Riga weighs nine kilograms and goes to the third floor, room twelve. "
    turns = (
        Turn("You are a porter.", note * 3 + "What is to be done?"),
        Turn("You are a clerk.", note * 3 + "The porter said:\n{1}\n\nWhere does it go?"),
    )
    study = Study("parcel", "a test", [Case("parcel", turns, "parcel")], [])
    texts = []
    for number in range(2):
        scores = measure(bench, study, MODES, tokens=6)
        file = tmp_path / f"{number}.json"
        write_json(file, {}, summarise(scores), scores)
        texts.append(file.read_text())
    assert texts[0] == texts[1]
    prompts = json.loads(texts[0])["prompts"]
    assert statistics.fmean(prompt["reused"] for prompt in prompts) > 0
    for prompt in prompts:
        parts = prompt["local"] + prompt["reused"] + prompt["computed"]
        assert parts == prompt["prompt_tokens"]
