# SPDX-License-Identifier: Apache-2.0
"""The command `kvcomm estimate` from a log to its table, page and numbers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from log_lines import LINES
from tiny_model import save_tokenizer
from typer.testing import CliRunner

from kvcomm_vllm.cli.main import app
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.estimate.encoder import Encoder
from kvcomm_vllm.estimate.numbers import mapping
from kvcomm_vllm.estimate.record import records
from kvcomm_vllm.estimate.report_page import estimate_page
from kvcomm_vllm.estimate.run import Options, Run

pytest.importorskip("transformers")

MODEL = "agents/one"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


def text(seed: object, count: int) -> str:
    chance = random.Random(repr(seed))
    return " ".join(f"w{chance.randrange(3, 500)}" for _ in range(count))


def body(agent: str, *texts: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": text(agent, 40)}]
    messages += [{"role": "user", "content": part} for part in texts]
    return {"model": MODEL, "messages": messages, "metadata": {"agent": agent}, **more}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def estimate(log: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["estimate", str(log), *options])


def numbers(log: Path, model: str, *options: str) -> dict[str, Any]:
    out = log.parent / "numbers.json"
    result = estimate(log, "--model", model, "--json", str(out), *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(out.read_text())
    check(found)
    return found


def check(found: dict[str, Any]) -> None:
    """Every token is counted once, in each of the tables."""
    for sums in [found["total"], *found["agents"]]:
        assert sums["local"] + sums["reused"] + sums["computed"] == sums["prompt_tokens"]
        assert 0 <= sums["prefix_alone"] <= sums["prompt_tokens"]
    for name in ("requests", "prompt_tokens", "prefix_alone", "local", "reused", "computed"):
        assert sum(sums[name] for sums in found["agents"]) == found["total"][name]
    assert sum(found["losses"].values()) == found["total"]["computed"]
    re_encoded = sum(row["tokens"] for row in found["re_encoded"])
    assert re_encoded == found["losses"].get("re_encoded", 0)


SHARED = text("document", 300)
TWO = (body("a", SHARED, text("a asks", 9)), body("b", SHARED, text("b asks", 9)))


def test_a_document_that_two_agents_read_is_reused(tmp_path: Path, model: str) -> None:
    found = numbers(write(tmp_path / "log", *TWO, TWO[1]), model, "--cache-salt", "s")
    a, b = found["agents"][1], found["agents"][0]
    assert (a["agent"], a["local"], a["reused"]) == ("a", 0, 0)
    assert (b["agent"], b["reused"]) == ("b", 300 - 16)
    assert b["local"] == b["prefix_alone"] == 349 // 16 * 16 - 16 * (349 % 16 == 0)
    assert found["losses"] == {"new": 349 + 49 + 349 % 16, "seam": 16}
    assert found["total"]["ratio"] < 0.7


def test_salts_are_tenants(tmp_path: Path, model: str) -> None:
    one, two = ({**row, "cache_salt": salt} for row, salt in zip(TWO, "xy", strict=True))
    assert numbers(write(tmp_path / "log", one, two), model)["total"]["reused"] == 0
    assert numbers(write(tmp_path / "log", *TWO), model)["total"]["reused"] > 200


def test_an_answer_in_the_log_is_reused_by_who_quotes_it(tmp_path: Path, model: str) -> None:
    said = text("answer", 200)
    reply = {"choices": [{"message": {"role": "assistant", "content": said}}]}
    asked, quoted = body("a", text("q", 30)), body("b", said, text("then", 9))
    told = numbers(write(tmp_path / "log", {**asked, "response": reply}, quoted), model)
    silent = numbers(write(tmp_path / "log", asked, quoted), model)
    assert told["total"]["reused"] > 150
    assert silent["total"]["reused"] == 0
    assert any("no answer" in note for note in silent["notes"])


def test_a_small_cache_loses_its_sources(tmp_path: Path, model: str) -> None:
    others = [body(str(n), text(("other", n), 400)) for n in range(4)]
    log = write(tmp_path / "log", TWO[0], *others, TWO[1])
    found = numbers(log, model, "--cache-tokens", "1024")
    assert found["total"]["reused"] == 0
    assert found["losses"]["source_evicted"] >= 290


def test_a_configuration_is_obeyed(tmp_path: Path, model: str) -> None:
    config = tmp_path / "kvcomm.yaml"
    config.write_text("mode: off\n")
    log = write(tmp_path / "log", *TWO)
    assert set(numbers(log, model, "--kvcomm-config", str(config))["losses"]) == {"mode_off"}


def test_broken_lines_are_counted_and_the_others_are_estimated(tmp_path: Path, model: str) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    rows = [
        *('{"messages": [', "7", {"model": MODEL, "messages": []}, TWO[0], "[]", "\ud83d"[:0]),
        {"model": "agents/other", "messages": TWO[0]["messages"]},
        {"model": MODEL, "messages": [{"role": "user", "content": image}]},
        {"model": MODEL, "prompt": [1] * 20_000},
        {"model": MODEL, "prompt": "w3 " * 400_000},
        {"model": MODEL, "prompt": {"of": "another type"}},
        TWO[1],
    ]
    found = numbers(write(tmp_path / "log", *rows), model, "--cache-tokens", "16000")
    assert found["total"]["requests"] == 2
    skipped = {row["kind"]: (row["lines"], row["first_line"]) for row in found["skipped"]}
    assert skipped == {
        "not_json": (1, 1),
        "no_request": (1, 2),
        "empty": (1, 3),
        "other_model": (1, 7),
        "media": (1, 8),
        "long_prompt": (2, 9),
        "wrong_type": (1, 11),
    }
    assert numbers(tmp_path / "log", model, "--served", "all")["total"]["requests"] >= 3


@pytest.mark.slow
@given(st.lists(LINES, max_size=6))
@settings(max_examples=150, deadline=None)
def test_no_line_breaks_an_estimate(shared_run: Run, lines: list[object]) -> None:
    """One run, so that what a line leaves behind meets the next ones."""
    before = shared_run.tally.total.requests + shared_run.tally.flaws.total
    for number, line in enumerate(lines):
        for record in records(line):
            before += 1
            shared_run.take(record, number)
    total = shared_run.tally.total
    assert total.requests + shared_run.tally.flaws.total == before
    assert total.local + total.reused + total.computed == total.prompt_tokens
    assert estimate_page(shared_run).encode()
    assert json.dumps(mapping(shared_run))


@pytest.fixture(scope="module")
def shared_run(model: str) -> Run:
    options = Options(KVCommConfig(), cache_tokens=1024, block_size=16, served="all")
    return Run(options, Encoder.load(model))


@pytest.mark.parametrize("content", ["", "\n\n", "no json", "{}\n7\n[]", '{"prompt": ""}'])
def test_a_log_without_requests_ends_with_one_line_and_status_2(
    tmp_path: Path, model: str, content: str
) -> None:
    result = estimate(write(tmp_path / "log", content), "--model", model)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_log_and_no_tokenizer_are_told_in_one_line(tmp_path: Path, model: str) -> None:
    log = write(tmp_path / "log", *TWO)
    for result in (
        estimate(tmp_path / "none", "--model", model),
        estimate(log, "--model", str(tmp_path)),
        estimate(log),
        estimate(log, "--model", model, "--block-size", "20"),
        estimate(log, "--model", model, "--html", str(tmp_path / "no" / "folder")),
    ):
        assert result.exit_code in (1, 2)
        assert len(result.stderr.strip().splitlines()) == 1
        assert isinstance(result.exception, SystemExit)


def test_the_page_is_whole_small_and_fetches_nothing(tmp_path: Path, model: str) -> None:
    rows = [*TWO, body("<script>alert(1)</script>", SHARED, text("x", 3000))]
    page = tmp_path / "page.html"
    log = write(tmp_path / "log", *rows, "broken")
    result = estimate(log, "--model", model, "--html", str(page))
    assert result.exit_code == 0
    content = page.read_text(encoding="utf-8")
    assert len(content.encode()) < 300_000
    assert not re.search(r"(?i)<script|src=|href=|url\(|@import", content)
    for word in ("prefers-color-scheme:dark", 'class="reused"', 'class="seam"', "Not counted"):
        assert word in content
    assert estimate(log, "--model", model, "--html", str(page), "--no-text").exit_code == 0
    assert "<pre>" not in page.read_text(encoding="utf-8")


def test_the_wanted_line_is_drawn(tmp_path: Path, model: str) -> None:
    page = tmp_path / "page.html"
    log = write(tmp_path / "log", *TWO)
    for options, wanted in (((), "line 2"), (("--line", "1"), "line 1")):
        assert estimate(log, "--model", model, "--html", str(page), *options).exit_code == 0
        assert f"The prompt of {wanted}" in page.read_text(encoding="utf-8")
