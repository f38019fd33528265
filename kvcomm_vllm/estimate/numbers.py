# SPDX-License-Identifier: Apache-2.0
"""Numbers and sentences that the screen, the page and the JSON file have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvcomm_vllm import __version__
from kvcomm_vllm.estimate.losses import explanation
from kvcomm_vllm.estimate.run import Run


def share(part: int, whole: int) -> str:
    """A share as whole per cents; of nothing it is a dash."""
    return f"{100 * part / whole:.0f}%" if whole else "–"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def headline(run: Run) -> str:
    """The result in one sentence."""
    total = run.tally.total
    alone, ours = total.computed_alone, total.computed
    return (
        f"{total.requests:,} requests with {total.prompt_tokens:,} prompt tokens: a prefix cache "
        f"alone leaves {share(alone, total.prompt_tokens)} of them to compute, kvcomm "
        f"{share(ours, total.prompt_tokens)}: a ratio of {ratio(total.ratio)}."
    )


def losses(run: Run) -> Iterator[tuple[str, int, str]]:
    """(word, computed tokens, explanation), the most first."""
    for word, tokens in run.tally.losses.most_common():
        yield word, tokens, explanation(word)


def notes(run: Run) -> Iterator[str]:
    """What one has to know to read the numbers."""
    tally, options = run.tally, run.options
    yield (
        f"One request after another, in the order of the log, with a cache of "
        f"{options.cache_tokens:,} tokens in pages of {options.block_size}; vLLM logs the size of "
        "yours at start."
    )
    if tally.unsalted:
        yield (
            f"{tally.unsalted:,} requests have no cache_salt: text is matched in whole windows "
            "alone, and all of them share it (--cache-salt NAME shows what one salt changes)."
        )
    missing = tally.total.requests - tally.answers
    if missing:
        yield (
            f"The log has no answer of {missing:,} requests: who quotes one first is counted as "
            "computing it."
        )
    if options.config.mode == "anchor":
        yield "Anchors are not simulated: seams are seam_tokens long, as on a server just started."
    yield "Tokens are not seconds: reused ones take a copy, seams and gaps an extra forward."


def mapping(run: Run) -> dict[str, Any]:
    """All of it, to be written as JSON."""
    tally, options = run.tally, run.options
    config = options.config.to_mapping()
    config["tiers"]["shared"] = str(options.config.tiers.shared)  # without its password
    return {
        "version": __version__,
        "settings": {
            "cache_tokens": options.cache_tokens,
            "block_size": options.block_size,
            "served": run.served,
            "cache_salt": options.salt,
            "config": config,
        },
        "total": vars(tally.total) | {"ratio": tally.total.ratio},
        "agents": [
            {"agent": name} | vars(sums) | {"ratio": sums.ratio}
            for name, sums in tally.largest(len(tally.agents) or 1)
        ],
        "losses": {word: tokens for word, tokens, _ in losses(run)},
        "re_encoded": [{"rendering": name} | vars(c) for name, c in tally.copied.items()],
        "skipped": [
            {"kind": flaw.value, "lines": c.number, "first_line": c.first_line, "detail": c.detail}
            for flaw, c in tally.flaws.counts.items()
        ],
        "notes": list(notes(run)),
    }
