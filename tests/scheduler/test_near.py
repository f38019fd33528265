# SPDX-License-Identifier: Apache-2.0
"""Near matches: text in another rendering is named, unrelated text and exact copies are not."""

from __future__ import annotations

import html
import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvcomm_vllm.hints import HintError, parse_hints
from kvcomm_vllm.scheduler import near
from kvcomm_vllm.scheduler.index import SequenceIndex

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "rag_squad.jsonl"
BLOCK, SPAN = 32, 32
TENANT = b"tenant"
FALSE_SHARE = 0.03  # of unrelated prompts that may be named

PROSE = """Shortly before the harvest an outside auditor visited the grain barges at Innisford.
Nobody had approved the budget for it, so the harbour office paid for fuel and for two meals.
Of 84 places on the list eleven had no cover at all, which the insurer called a small miracle.
The relief team then painted the trams so that winter deliveries would not be held up again.
A ferry pilot complained that ice augers were stored beside the only working crane on the quay.
Later the same week a survey crew found three water meters that had been fitted upside down.
Costs came to 926 crowns, a little less than planned, although the old fittings had corroded.
"""
CODE = '''import csv
from pathlib import Path

def load_rows(path: Path, limit: int = 792) -> dict[str, float]:
    """Return totals per site, at most `limit` of them."""
    totals: dict[str, float] = {}
    with path.open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if not row["amount"]:
                continue
            site = row["site"].strip().lower()
            totals[site] = totals.get(site, 0.0) + 39 * float(row["amount"])
    if len(totals) > limit:
        raise ValueError(f"load_rows: too many sites: {len(totals)}")
    return totals
'''
SCHEMAS = [
    {
        "type": "function",
        "name": f"{verb}_contract",
        "description": f"Use this to {verb} a contract that another department has signed.",
        "parameters": {"type": "object", "properties": {"limit": {"type": "integer"}}},
    }
    for verb in ("compare", "update", "archive", "translate", "summarise")
]
RENDERINGS: dict[str, tuple[str, str]] = {
    "numbered lines": (
        CODE,
        "".join(f"{n:6}\t{line}\n" for n, line in enumerate(CODE.splitlines(), 1)),
    ),
    "CRLF": (PROSE, PROSE.replace("\n", "\r\n")),
    "hard wraps": (PROSE.replace("\n", " "), textwrap.fill(PROSE, 60)),
    "block quotes": (PROSE, "".join(f"> {line}\n" for line in PROSE.splitlines())),
    "JSON string": (CODE, json.dumps(CODE)),
    "HTML": (CODE, html.escape(CODE)),
    "sorted keys": (json.dumps(SCHEMAS), json.dumps(SCHEMAS, sort_keys=True)),
}

Tokens = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def tokenise(smollm2: str) -> Tokens:
    transformers = pytest.importorskip("transformers")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(smollm2)
    return lambda text: tokenizer(text)["input_ids"]


class Store:
    """An index with whole texts in it, asked as the scheduler half asks it."""

    def __init__(self) -> None:
        self.index = SequenceIndex(BLOCK, 16, max_sequences=1024, max_tokens=1 << 17)

    def keep(self, tokens: list[int], tenant: bytes = TENANT) -> None:
        blocks = -(-len(tokens) // BLOCK)
        hashes = [b"%d" % block for block in range(blocks)]
        owner = str(len(self.index))
        self.index.add(
            tenant, np.array(tokens, np.int32), hashes, len(tokens), None, True, owner=owner
        )

    def near(self, tokens: list[int]) -> list[near.Near]:
        prompt = np.array(tokens, np.int32)
        known = np.zeros(len(prompt), np.bool_)
        for match in self.index.find(TENANT, prompt, 0, SPAN):
            known[match.prompt_start : match.prompt_start + match.length] = True
        return near.near(prompt, known, [s.tokens for s in self.index.recent(TENANT)])


def words(seed: object, count: int) -> list[int]:
    rng = random.Random(repr(seed))
    return [rng.randrange(100, 40_000) for _ in range(count)]


@pytest.mark.model
@pytest.mark.parametrize("kind", RENDERINGS)
def test_text_in_another_rendering_is_named(tokenise: Tokens, kind: str) -> None:
    store = Store()
    plain, rendered = map(tokenise, RENDERINGS[kind])
    store.keep([*words("one", 40), *plain])
    head = words("two", 50)
    found = store.near([*head, *rendered, *words("tail", 20)])
    assert found, "not found"
    assert {row[3] for row in map(near.Near.listed, found)} == {"re-encoded"}
    ends = len(head) + len(rendered)
    inside = [stretch for stretch in found if len(head) - 4 <= stretch.start < stretch.end]
    assert all(stretch.end <= ends + 4 for stretch in inside)
    assert sum(stretch.end - stretch.start for stretch in inside) > 0.5 * len(rendered)


@pytest.mark.model
@pytest.mark.parametrize("kind", RENDERINGS)
def test_the_same_rendering_on_both_sides_is_a_match(tokenise: Tokens, kind: str) -> None:
    store = Store()
    rendered = tokenise(RENDERINGS[kind][1])
    store.keep([*words("one", 40), *rendered])
    assert store.near([*words("two", 50), *rendered, *words("tail", 20)]) == []


@pytest.mark.model
def test_unrelated_english_is_seldom_named(tokenise: Tokens) -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name} in ../shared/data")
    lines = DATA.read_text(encoding="utf-8").splitlines()[:200]
    passages = dict.fromkeys(text for line in lines for text in json.loads(line)["passages"])
    texts = [tokenise(text) for text in passages]
    store = Store()
    for text in texts[::2]:
        store.keep(text)
    others = texts[1::2]
    named = [number for number, text in enumerate(others) if store.near(text)]
    assert len(others) > 80
    assert len(named) <= FALSE_SHARE * len(others), named


@settings(deadline=None)
@given(
    every=st.integers(8, 28),
    added=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    replaced=st.integers(0, 2),
    head=st.integers(0, 200),
)
def test_tokens_changed_in_every_line_are_near(
    every: int, added: list[int], replaced: int, head: int
) -> None:
    share = (every - replaced - near.SHINGLE + 1) / (every + len(added) - replaced)
    assume(share > near.LEAST_SHARE + 0.05)
    text, store = words("text", 600), Store()
    store.keep(text)
    changed: list[int] = []
    for line in range(0, len(text), every):
        changed += added
        changed += text[line + replaced : line + every]
    (found,) = store.near([*words("head", head), *changed])
    assert found.start <= head + every + 4
    assert found.end >= head + len(changed) - (every + len(added))
    assert abs(found.share - share) < 0.05


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 300), st.integers(0, 100))
def test_exact_copies_are_not_near(start: int, length: int, head: int) -> None:
    text, store = words("text", 700), Store()
    store.keep(text)
    assert store.near([*words("head", head), *text[start : start + length]]) == []


def test_an_exact_copy_that_may_not_be_used_is_not_called_re_encoded() -> None:
    text = np.array(words("text", 200), np.int32)
    assert near.near(text, np.zeros(200, np.bool_), [text]) == []


def test_blanks_and_rules_are_no_text() -> None:
    rule = [7, 7, 8, 7] * 100
    prompt = [*rule[:160], *words("between", 9), *rule[:120]]
    known = np.zeros(len(prompt), np.bool_)
    assert near.near(np.array(prompt, np.int32), known, [np.array(rule, np.int32)]) == []


def test_nothing_known_is_part_of_a_stretch() -> None:
    text = words("text", 400)
    changed = np.array([0 if place % 10 == 0 else t for place, t in enumerate(text)], np.int32)
    known = np.zeros(400, np.bool_)
    known[150:200] = True
    found = near.near(changed, known, [np.array(text, np.int32)])
    assert len(found) == 2
    assert not any(known[stretch.start : stretch.end].any() for stretch in found)


def test_the_longest_stretches_come_first_and_are_few() -> None:
    texts = [words(number, 60 + 10 * number) for number in range(12)]
    prompt = [0 if place % 9 == 0 else t for text in texts for place, t in enumerate(text)]
    parts = [np.array(text, np.int32) for text in texts]
    found = near.near(np.array(prompt, np.int32), np.zeros(len(prompt), np.bool_), parts)
    lengths = [stretch.end - stretch.start for stretch in found]
    assert lengths == sorted(lengths, reverse=True)
    assert 0 < len(found) <= near.STRETCHES


def test_what_is_looked_at_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = words("text", 300)
    changed = [0 if place % 10 == 0 else t for place, t in enumerate(text)]
    store = Store()
    store.keep(text)
    assert store.near(changed)
    for number in range(20):
        store.keep(words(number, 100))
    assert store.near(changed)
    monkeypatch.setattr(near, "MOST_SEQUENCES", 20)
    assert store.near(changed) == []
    monkeypatch.setattr(near, "MOST_SEQUENCES", 21)
    assert store.near(changed)
    monkeypatch.setattr(near, "MOST_TOKENS", 2000)
    assert store.near(changed) == []


@pytest.mark.parametrize("length", range(6))
def test_prompts_shorter_than_a_shingle_have_nothing_near(length: int) -> None:
    store = Store()
    assert store.near(words("text", length)) == []
    store.keep(words("text", 64))
    assert store.near(words("text", length)) == []


def test_the_most_recently_used_come_first_and_only_of_one_tenant() -> None:
    store = Store()
    for number in range(6):
        store.keep(words(number, 40), (TENANT, b"other")[number % 2])
    first, _, _ = recent = list(store.index.recent(TENANT))
    assert [sequence.owner for sequence in recent] == ["4", "2", "0"]
    store.index.touch(recent[2])
    assert next(store.index.recent(TENANT)) is recent[2]
    store.index.drop(first)
    assert [sequence.owner for sequence in store.index.recent(TENANT)] == ["0", "2"]


@pytest.mark.parametrize(("value", "meant"), [(True, True), (False, False), (None, False)])
def test_the_hint_is_true_or_false(value: object, meant: bool) -> None:
    assert parse_hints({"kvcomm": {"explain": value}}).explain is meant


@pytest.mark.parametrize("value", [1, "yes", []])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(HintError, match=r"kvcomm\.explain: .* allowed: true or false"):
        parse_hints({"kvcomm": {"explain": value}})


def test_the_documented_bounds_are_the_ones_in_force() -> None:
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    for said in (
        f"the {near.MOST_SEQUENCES} sequences used last",
        f"with {near.MOST_TOKENS:,} tokens",
        f"{near.MOST_PROMPT:,} tokens of the prompt",
        f"have {near.LEAST_TOKENS} tokens or more, a share of {near.LEAST_SHARE} to",
        f"to {near.MOST_SHARE}, ",
    ):
        assert said in page, said
