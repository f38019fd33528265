# SPDX-License-Identifier: Apache-2.0
"""On a real model, answers with reused KV stay as close to dense ones as the README says."""

import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.measure import measure
from kvcomm_vllm.evaluation.fidelity.probes import measure_probes
from kvcomm_vllm.evaluation.fidelity.report import summarise, write_json
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.fidelity.turns import along
from kvcomm_vllm.evaluation.workloads import cases as cases_of
from kvcomm_vllm.evaluation.workloads import math
from kvcomm_vllm.evaluation.workloads.case import Answer, Case, Turn
from kvcomm_vllm.evaluation.workloads.data_set import BESIDE
from kvcomm_vllm.evaluation.workloads.edits import Kind, drop_oldest, turns
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
    solved = [case for row in rows for case in math.solve(row, random.Random(0), agents=3)]
    cases = [replace(case, answer=Answer.TEXT) for case in solved]  # what they say is not asked for
    study = Study("gsm8k3", "questions", cases, [])
    rotate, seam = summarise(measure(bench, study, MODES, tokens=24))
    assert seam.reused > 0.5
    assert 0 < seam.kl_mean <= 0.02
    assert seam.kl_mean < rotate.kl_mean, "a seam must help"


def test_errors_do_not_grow_from_edit_to_edit(bench: Bench) -> None:
    """The oldest turn of a session is dropped again and again, behind copies of copies."""
    kind = Kind((("oldest turn dropped", drop_oldest),) * 6, tools=(0, 0))
    case = Case("dropped", turns(kind, "dropped", 1400), "dropped")
    _, *edits = along(bench, case, {"mode": "seam"})
    assert all(score.computed < 0.15 for score in edits)
    first = [score.distance.kl1 for score in edits]
    assert 0 < statistics.fmean(first) <= 0.1
    assert statistics.fmean(first[3:]) <= 2 * statistics.fmean(first[:3])


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


def test_a_probe_is_answered_from_kv_of_the_prompt_before_the_edit(bench: Bench) -> None:
    """And its dense answer from none of it."""
    found, source = cases_of("stale-memory", None, seed=0)
    study = Study("stale-memory", source, found[:2], [])
    scores = measure_probes(bench, study, [("seam16", 0)])
    again = measure_probes(bench, study, [("rotate", 0), ("anchor", 20)])
    assert [score.mode for score in (*scores, *again)] == ["seam16"] * 2 + ["rotate"] * 2
    for seam, rotate in zip(scores, again, strict=True):
        assert seam.reused > seam.prompt_tokens / 2
        assert rotate.computed <= seam.computed
        assert seam.kl1 > 0
        assert seam.dense_odds == rotate.dense_odds, "dense is dense, whatever was served before"
