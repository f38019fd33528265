# SPDX-License-Identifier: Apache-2.0
"""Which tokens behind an edit hold the old value, and what it costs to compute them again.

Usage: python benchmarks/staleness.py --model models/Qwen2.5-Coder-0.5B-Instruct --kinds memory fact

Each probe (``evaluation/workloads/probes.py``) is served from the KV of the prompt before its edit,
under several rules of what is computed again. Told of each: the KL of the answer's first token from
the exact one, and by how many nats the right answer has lost against the stale one. Plain torch in
float32, no vLLM.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from edits import Served, Turn, both, defaults, moved_most, reuse, to_compute
from plain_model import KV, PlainModel

from kvcomm_vllm.evaluation.workloads.case import fill
from kvcomm_vllm.evaluation.workloads.probes import CHANGES, Change, draw
from kvcomm_vllm.scheduler.refresh import BEHIND_EDIT
from kvcomm_vllm.scheduler.repeats import repeats

WORD = re.compile(r"[A-Za-z]{4,}")
# said everywhere: whoever shares one of these says nothing about the same thing
EVERYWHERE = (
    "that this with from have what which does they will about your when more than first user "
    "assistant tool today time name number month year week call again another town"
)
COMMON = frozenset(EVERYWHERE.split())


@dataclass(frozen=True)
class Prompt:
    """Token ids int32 ``[n]``, and where in ``text`` each token begins and ends: int ``[n, 2]``."""

    text: str
    ids: np.ndarray
    places: np.ndarray

    def tokens(self, wanted: Callable[[str], bool]) -> np.ndarray:
        """The tokens of all lines that are wanted: bool [n]."""
        found, start = np.zeros(len(self.ids), np.bool_), 0
        for line in self.text.split("\n"):
            end = start + len(line)
            if wanted(line):
                found |= (self.places[:, 1] > start) & (self.places[:, 0] <= end)
            start = end + 1
        return found


@dataclass(frozen=True)
class Asked:
    """A probe as it stands in the prompt behind its edit.

    Args:
        edited: the line that the edit has changed; ``question``: the one that is asked.
        rests: lines that rest on it.
    """

    prompt: Prompt
    edited: str
    question: str
    rests: tuple[str, ...]


More = Callable[[Served, Asked], np.ndarray]


def words_of(line: str) -> set[str]:
    """What a line is about: its longer words in lower case, without an ending."""
    found = (word.lower() for word in WORD.findall(line))
    return {word.rstrip("s") for word in found if word not in COMMON}


def lines_like(line: Callable[[Asked], str], least: int = 1) -> More:
    """Lines that have so many words in common with one."""

    def chosen(served: Served, asked: Asked) -> np.ndarray:
        said = words_of(line(asked))
        return asked.prompt.tokens(lambda text: len(words_of(text) & said) >= least)

    return chosen


def either(*rules: More) -> More:
    def chosen(served: Served, asked: Asked) -> np.ndarray:
        return np.asarray(np.logical_or.reduce([rule(served, asked) for rule in rules]))

    return chosen


def unasked(rule: Callable[[Served], np.ndarray]) -> More:
    """A rule that looks at no question."""
    return lambda served, asked: rule(served)


def last(count: int) -> More:
    """So many tokens before the end of what is loaded."""

    def chosen(served: Served, asked: Asked) -> np.ndarray:
        found = np.zeros(len(served.ids), np.bool_)
        end = int(np.flatnonzero(served.loaded)[-1]) + 1
        found[max(0, end - count) : end] = True
        return found

    return chosen


def resting(served: Served, asked: Asked) -> np.ndarray:
    """The lines that rest on the edited one, which nobody knows beforehand."""
    return asked.prompt.tokens(lambda text: any(one in text for one in asked.rests))


PHRASES, DEFAULTS = unasked(both), unasked(defaults)
QUESTION = lines_like(lambda asked: asked.question)
EDITED = lines_like(lambda asked: asked.edited)
RULES: dict[str, tuple[int, More | None]] = {
    "as it is": (0, None),
    "seam of 16": (16, None),
    "seam of 64": (64, None),
    "seam of 128": (128, None),
    "phrases": (16, PHRASES),
    "phrases, seam of 24": (24, PHRASES),
    "phrases and words": (16, DEFAULTS),
    f"defaults: phrases and words, seam of {BEHIND_EDIT}": (BEHIND_EDIT, DEFAULTS),
    "last 64 of it": (16, last(64)),
    "last 128 of it": (16, last(128)),
    "lines like the edited one": (16, EDITED),
    "lines like the question": (16, QUESTION),
    "lines like the question, and phrases": (16, either(QUESTION, PHRASES)),
    "lines that rest on it (oracle)": (16, resting),
    "the 5% moved most (oracle)": (16, unasked(moved_most(0.05))),
    "the 15% moved most (oracle)": (16, unasked(moved_most(0.15))),
}


def prompt_of(model: PlainModel, system: str, user: str, lead: str) -> Prompt:
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    found = model.tokenizer(text + lead, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(found["input_ids"], np.int32)
    return Prompt(text + lead, ids, np.array(found["offset_mapping"]))


def exact(model: PlainModel, ids: np.ndarray) -> tuple[KV, torch.Tensor]:
    """KV of all, and log-probabilities of the next token."""
    kv = KV(model.layers, model.kv_heads, len(ids), model.size)
    return kv, model.forward(ids, kv, np.arange(len(ids)), 1)


@dataclass(frozen=True)
class Probe:
    """A probe ready to be served.

    Args:
        old, old_kv: token ids of the prompt before the edit, and its KV.
        turn: the one behind it, with its exact KV and log-probabilities.
        told, stale: the tokens that tell the right answer from the stale one.
    """

    change: Change
    asked: Asked
    old: np.ndarray
    old_kv: KV
    turn: Turn
    told: int
    stale: int

    def row(self, got: torch.Tensor) -> dict[str, Any]:
        """What an answer's log-probabilities come down to."""
        dense, names = self.turn.exact[-1], {self.told: "right", self.stale: "stale"}
        odds = [float(logs[self.told] - logs[self.stale]) for logs in (dense, got)]
        return {
            "kl": float((dense.exp() * (dense - got)).sum()),
            "said": names.get(int(got.argmax()), "other"),
            "dense_said": names.get(int(dense.argmax()), "other"),
            "lost": odds[0] - odds[1],
        }


def ready(model: PlainModel, number: int, seed: int, kind: str) -> Probe:
    change, (before, after) = draw(number, seed, kind)
    lead = change.asked[1]
    user = fill(after.user, [before.reply])
    old = prompt_of(model, before.system, before.user, before.reply)
    new = prompt_of(model, after.system, user, lead)
    stale, right = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in change.values
    )
    alike = next(n for n, pair in enumerate(zip(right, stale, strict=False)) if len({*pair}) > 1)
    ids = np.append(new.ids, np.array(right[:alike], np.int32))
    places = np.vstack([new.places, np.full((alike, 2), len(new.text) + 1)])
    gone, came = (
        set(one.system.split("\n")) - set(other.system.split("\n"))
        for one, other in ((before, after), (after, before))
    )
    asked = Asked(
        Prompt(new.text, ids, places),
        next(iter(came or gone)),
        change.asked[0],
        (change.note, change.said),
    )
    old_kv, _ = exact(model, old.ids)
    new_kv, logs = exact(model, ids)
    turn = Turn(ids, len(ids), new_kv, logs[-1:])
    return Probe(change, asked, old.ids, old_kv, turn, right[alike], stale[alike])


def serve(model: PlainModel, one: Probe, seam: int, more: More | None) -> dict[str, Any]:
    served = reuse(one.turn, one.old, one.old_kv, repeats(one.old), seam)
    computed = ~served.loaded
    if more is not None:
        computed = to_compute(served, more(served, one.asked))
    got = model.forward(served.ids, served.kv, np.flatnonzero(computed), 1)[-1]
    return {"computed": float(computed.mean()), **one.row(got)}


def where(model: PlainModel, one: Probe, seam: int = 16) -> list[tuple[float, float, str]]:
    """By line of what is loaded: the KL and the odds lost if its KV alone were exact; the first
    with no such line.
    """
    served = reuse(one.turn, one.old, one.old_kv, repeats(one.old), seam)
    computed, head = np.flatnonzero(~served.loaded), int(np.argmin(served.loaded))
    found, prompt = [], one.asked.prompt
    for number, line in enumerate(["", *prompt.text.split("\n")]):
        kv = served.kv.empty(len(served.ids))
        kv.take(served.kv, 0, 0, len(served.ids))
        if number:
            mine = served.loaded & prompt.tokens(lambda text, line=line: text == line)
            mine[:head] = False
            for at in np.flatnonzero(mine):
                kv.take(one.turn.kv, int(at), int(at), 1)
            if not mine.any():
                continue
        row = one.row(model.forward(served.ids, kv, computed, 1)[-1])
        found.append((row["kl"], row["lost"], line))
    return found


def show(kind: str, rows: list[dict[str, Any]]) -> None:
    """A line of the table per rule."""
    for rule in RULES:
        some = [row for row in rows if row["rule"] == rule]
        kl = sorted(row["kl"] for row in some)
        print(
            f"| {kind} | {rule} | {mean(row['computed'] for row in some):.1%} | "
            f"{sum(row['said'] == 'right' for row in some)} | "
            f"{sum(row['said'] == 'stale' for row in some)} | {mean(kl):.4f} | "
            f"{kl[int(0.95 * (len(kl) - 1))]:.4f} | {mean(row['lost'] for row in some):+.3f} | "
            f"{max(row['lost'] for row in some):+.2f} |",
            flush=True,
        )


def show_where(case: str, found: list[tuple[float, float, str]]) -> None:
    """The lines that matter most, most first."""
    (kl, lost, _), *lines = found
    print(f"{case}: KL {kl:.4f}, lost {lost:+.3f}; with one line exact:")
    for better, left, line in sorted(lines)[:4]:
        print(f"    {better:.4f}, {left:+.3f}: {line[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", nargs="*", default=[*CHANGES], choices=[*CHANGES])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--probes", type=int, default=8, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", action="store_true", help="which line's KV makes the difference")
    parser.add_argument("--json", type=Path, help="rows are added to what it has")
    args = parser.parse_args()
    model = PlainModel(args.model)
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    print("| kind | rule | computed | right | stale | KL, mean | p95 | lost, mean | worst |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        for number in range(args.first, args.first + args.probes):
            one = ready(model, number, args.seed, kind)
            told = {"kind": kind, "case": f"{kind}-{number}", "form": one.change.form}
            for rule, (seam, more) in RULES.items():
                kept.append({**told, "rule": rule, **serve(model, one, seam, more)})
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
            if args.where:
                show_where(told["case"], where(model, one))
        show(kind, [row for row in kept if row["kind"] == kind])


if __name__ == "__main__":
    main()
