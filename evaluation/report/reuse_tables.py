# SPDX-License-Identifier: Apache-2.0
"""Tables of what was reused, whether it paid, what it took, and what it did to the answers."""

from __future__ import annotations

from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.numbers import count, fixed, points, share, tokens
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.table import Table, name


def quality_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            count(row.scored),
            share(row.score),
            points(row.difference),
            count(row.compared),
            share(row.equal_answers),
            share(row.equal_start),
            share(row.consistent),
        ]
        for row in content.quality
    ]
    note = (
        "Difference: percentage points to plain on the same tasks. Equal prompts: calls whose "
        "prompt is plain's token for token; of these, the share of equal greedy answers and of the "
        "answer before the first difference. plain_nocache shows what rounding alone does. "
        "Consistent: judges who see the same candidates in another order choose the same one."
    )
    head = ["workload", "column", "scored tasks", "score", "difference, points [95%]"]
    head += ["equal prompts", "equal answers", "equal start", "consistent"]
    return Table("quality", "Answers", note, head, rows)


def reuse_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            share(row.of_prompt),
            share(row.of_repeated),
            share(row.of_quoted),
            count(row.quoting),
            _part(row.reusing, row.quoting),
            _part(row.fully, row.quoting),
        ]
        for row in content.reuse
    ]
    note = (
        "Of the prompt, of what an earlier request of the column had computed, and of that without "
        "the agents' own cached prefixes. Quoting calls contain text of other requests; of these, "
        "the share that reused some of it, and all of it but for seams and one page. Exact "
        "definitions: see “How it is counted”."
    )
    head = ["workload", "column", "of prompt", "of repeated", "of quoted", "quoting calls"]
    return Table("reuse", "Reuse", note, [*head, "reusing some", "reusing all"], rows)


def tokens_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            *map(count, (row.prompt, row.local, row.reused, row.corrected, row.computed)),
            count(row.repeated),
        ]
        for row in content.reuse
    ]
    note = (
        "Prompt tokens, sums. local: the column's own prefix cache; reused: from other requests, "
        "corrected ones among them; repeated: an earlier request of the column had them already."
    )
    head = ["workload", "column", "prompt", "local", "reused", "corrected", "computed", "repeated"]
    return Table("tokens", "Tokens by treatment", note, head, rows)


def declined_table(content: Content) -> Table:
    rows = [
        [*name(row), reason, count(number)]
        for row in content.reuse
        for reason, number in sorted(row.declined.items(), key=lambda item: -item[1])
        if row.workload != ALL
    ]
    note = "How often the server counted a reason for reusing nothing, or not a span of the prompt."
    head = ["workload", "column", "reason", "times"]
    return Table("declined", "Why something was not reused", note, head, rows, labels=3)


def break_even_table(content: Content) -> Table:
    rows = [
        [
            *name(row),
            fixed(row.by_prompt.slope * 1e3 if row.by_prompt else None, 0),
            fixed(row.saved.slope * 1e3 if row.saved else None, 0),
            fixed(row.saved.start if row.saved else None, 1),
            tokens(row.shared_tokens),
            count(row.fewest_reused),
            fixed(row.warmup_cost_s, 2),
            count(row.calls_until_ahead),
        ]
        for row in content.break_even
    ]
    note = (
        "Straight lines through the calls after warm-up: time to first token by prompt length, and "
        "time saved against plain by reused tokens. Pays from: reused tokens where the second line "
        "crosses zero (– : it does not, or cannot be told; below the fewest measured it is a "
        "guess). Ahead from call: where the sum of all times, warm-up included, stays below "
        "plain's (– : not within this run)."
    )
    head = ["workload", "column", "ms per 1,000 prompt tokens", "ms saved per 1,000 reused"]
    head += ["ms saved with 0 reused", "pays from, tokens [95%]", "fewest reused"]
    head += ["warm-up cost, s", "ahead from call"]
    return Table("break-even", "When it pays", note, head, rows)


def memory_table(content: Content) -> Table:
    rows = [
        [
            row.server,
            *map(count, (row.looks, row.first_mb, row.last_mb, row.most_mb)),
            share(row.most_kv),
            *map(count, (row.slots, row.anchors)),
        ]
        for row in content.memory
    ]
    note = (
        "Per server; one may serve several columns. Resident memory of its processes: after "
        "warm-up, at the end, at most; pages: the largest share of the KV cache in use when looked "
        "at; slots with anchors, and anchors, at the end."
    )
    head = ["server", "looks", "after warm-up MB", "end MB", "most MB", "pages in use"]
    return Table("memory", "Memory", note, [*head, "slots", "anchors"], rows, labels=1)


def _part(part: int | None, whole: int | None) -> str:
    return share(part / whole) if part is not None and whole else share(None)
