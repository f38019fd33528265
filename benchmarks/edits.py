# SPDX-License-Identifier: Apache-2.0
"""What an edit near the head of a prompt does to KV behind it, and what it costs to mend.

Usage: python benchmarks/edits.py --model models/SmolLM2-135M-Instruct [--steps 8] [--kinds ...]

A session of one agent is served turn after turn, each from the KV of the turn before, as the plugin
would, under several rules of what is computed again. Keys are kept unrotated, so that nothing but
the context differs. Each answer is compared with the exact one: KL of its first token, and the mean
over its first tokens, given the exact answer's words. Plain torch in float32, no vLLM.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from edit_sessions import SESSIONS
from plain_model import KV, PlainModel

from kvcomm_vllm.scheduler.cover import true_runs
from kvcomm_vllm.scheduler.refresh import BEHIND_EDIT, LEAST_LOAD
from kvcomm_vllm.scheduler.repeats import PHRASE, precedents, repeats, with_the_next

ANSWER = 8  # tokens compared
PAGE = 32
LEAST = 32  # shorter common text is computed


@dataclass(frozen=True)
class Rule:
    """What of reused text is computed again: ``seam`` tokens at its beginning, and those that
    ``more`` says.
    """

    name: str
    seam: int = 16
    more: Callable[[Served], np.ndarray] | None = None


@dataclass
class Served:
    """A prompt about to be served: token ids, what is loaded, and what its KV has seen."""

    ids: np.ndarray
    prompt_tokens: int
    loaded: np.ndarray
    saw: np.ndarray
    kv: KV
    exact: KV


def stale(served: Served) -> np.ndarray:
    """Phrases that were repeated where their KV was computed and are not here, or the other way
    around.
    """
    return np.asarray((repeats(served.ids) ^ served.saw) & PHRASE != 0)


def words(served: Served) -> np.ndarray:
    """These, single words however far behind the edit, and the token behind each."""
    return with_the_next(repeats(served.ids) != served.saw)


def answers(served: Served) -> np.ndarray:
    found = np.zeros(len(served.ids), np.bool_)
    found[: served.prompt_tokens] = precedents(served.ids[: served.prompt_tokens])
    return found


def both(served: Served) -> np.ndarray:
    return stale(served) | answers(served)


def defaults(served: Served) -> np.ndarray:
    return words(served) | answers(served)


def at_random(share: float) -> Callable[[Served], np.ndarray]:
    def chosen(served: Served) -> np.ndarray:
        draw = np.random.default_rng(len(served.ids)).random(len(served.ids))
        return np.asarray(draw < share)

    return chosen


def moved_most(share: float) -> Callable[[Served], np.ndarray]:
    """Those whose KV is farthest from exact, which only an oracle knows."""

    def chosen(served: Served) -> np.ndarray:
        far = served.kv.distance(served.exact)
        far[~served.loaded] = 0
        found = np.zeros(len(served.ids), np.bool_)
        found[np.argsort(-far)[: int(share * served.loaded.sum())]] = True
        return found

    return chosen


RULES = (
    Rule("as it is", seam=0),
    Rule("seam of 16"),
    Rule("seam of 64", seam=64),
    Rule("seam of 128", seam=128),
    Rule("15% at random", more=at_random(0.15)),
    Rule("repetitions changed", more=stale),
    Rule("where answers began", more=answers),
    Rule("both", more=both),
    Rule("both, seam of 4", seam=4, more=both),
    Rule("both, and words", more=defaults),
    Rule(f"both, and words, seam of {BEHIND_EDIT}", seam=BEHIND_EDIT, more=defaults),
    Rule("the 15% moved most", more=moved_most(0.15)),
)


@dataclass(frozen=True)
class Turn:
    """A prompt with its exact answer: ids of both, KV, log-probabilities of the answer."""

    ids: np.ndarray
    prompt_tokens: int
    kv: KV
    exact: torch.Tensor


def exact_turns(model: PlainModel, messages: Iterator[list[dict[str, str]]]) -> list[Turn]:
    turns = []
    for prompt in messages:
        ids = model.tokens(prompt)
        answered, kv, exact = model.answer(ids, ANSWER)
        turns.append(Turn(answered, len(ids), kv, exact))
    return turns


def play(model: PlainModel, turns: list[Turn], rule: Rule) -> list[dict[str, float]]:
    """Each turn behind the first, served from the KV of the one before."""
    before_ids, before, saw = turns[0].ids, turns[0].kv, repeats(turns[0].ids)
    found = []
    for turn in turns[1:]:
        served = reuse(turn, before_ids, before, saw, rule.seam)
        computed = ~served.loaded if rule.more is None else to_compute(served, rule.more(served))
        served.saw[computed] = repeats(served.ids)[computed]
        got = model.forward(served.ids, served.kv, np.flatnonzero(computed), ANSWER)
        kl = (turn.exact.exp() * (turn.exact - got)).sum(-1)
        prompt = computed[: turn.prompt_tokens]
        found.append(
            {"first": float(kl[0]), "mean": float(kl.mean()), "computed": float(prompt.mean())}
        )
        before_ids, before, saw = served.ids, served.kv, served.saw
    return found


def to_compute(served: Served, again: np.ndarray) -> np.ndarray:
    """What is computed where ``again``, behind the prefix hit, is not loaded: bool [n]."""
    again[: int(np.argmin(served.loaded))] = False
    kept = true_runs(served.loaded & ~again)
    computed = np.ones(len(again), np.bool_)
    for start, stop in kept:  # as the plugin: no operation for a few tokens
        computed[start:stop] = stop - start < LEAST_LOAD
    return computed


def reuse(turn: Turn, old: np.ndarray, kv: KV, saw: np.ndarray, seam: int) -> Served:
    """The prefix by whole pages, then what both texts have in common, behind seams."""
    ids, end = turn.ids, turn.prompt_tokens - 1
    size = min(len(ids), len(old))
    differ = np.flatnonzero(ids[:size] != old[:size])
    head = min(int(differ[0]) if len(differ) else size, end) // PAGE * PAGE
    served = Served(
        ids,
        turn.prompt_tokens,
        np.zeros(len(ids), np.bool_),
        repeats(ids),
        kv.empty(len(ids)),
        turn.kv,
    )
    parts = [(0, 0, head)]
    matcher = SequenceMatcher(None, old.tolist(), ids[:end].tolist(), autojunk=False)
    for at, to, length in matcher.get_matching_blocks():
        first = max(to, head) + (seam if to > head or at != to else 0)
        if to + length - first >= LEAST:
            parts.append((at + first - to, first, to + length - first))
    for at, to, length in parts:
        served.kv.take(kv, at, to, length)
        served.loaded[to : to + length] = True
        served.saw[to : to + length] = saw[at : at + length]
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", default=sorted(SESSIONS), choices=sorted(SESSIONS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = PlainModel(args.model)
    rows: list[dict[str, Any]] = []
    print("| session | rule | computed | KL, first token | worst | last | KL, 8 tokens |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        turns = exact_turns(model, SESSIONS[kind](args.steps))
        for rule in RULES:
            got = play(model, turns, rule)
            row = {"session": kind, "rule": rule.name, "turns": got}
            rows.append(row)
            first = [one["first"] for one in got]
            print(
                f"| {kind} | {rule.name} | {mean(one['computed'] for one in got):.1%} | "
                f"{mean(first):.4f} | {max(first):.4f} | {first[-1]:.4f} | "
                f"{mean(one['mean'] for one in got):.4f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
