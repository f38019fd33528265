# SPDX-License-Identifier: Apache-2.0
"""The verdicts of a run as a table, and its sums."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kvcomm_vllm.evaluation.cases.judge import Verdict
from kvcomm_vllm.evaluation.report import table

_COUNTS = ("prompt", "local", "reused", "computed", "approximate")
_COLUMNS = ["case", "#", "HTTP", *_COUNTS, "KL", "top", "said"]


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A row per request; ``top`` is OTHER where dense's likeliest token was clear, and lost."""
    rows = []
    for v in verdicts:
        counts = (v.prompt, v.local, v.reused, v.computed, v.from_approximate)
        kl = "" if v.kl is None else f"{v.kl:.4f}"
        shown = ("" if count is None else str(count) for count in counts)
        said = "; ".join(word for word in [v.declined, *v.faults] if word)
        rows.append([v.case, str(v.number), str(v.status), *shown, kl, _top(v), said])
    return words(_COLUMNS, rows)


def words(head: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are all words."""
    return table.markdown(head, rows, labels=len(head))


def _top(verdict: Verdict) -> str:
    if verdict.same_top is None:
        return ""
    return "same" if verdict.same_top else "OTHER" if verdict.clear else "other"


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Distance over the requests that used earlier KV, and how many requests fell short."""
    used = [v for v in verdicts if v.kl is not None and v.reused]
    kls = sorted(v.kl for v in used if v.kl is not None)
    clear = [v for v in used if v.clear]
    return {
        "requests": len(verdicts),
        "compared": len(used),
        "kl_mean": round(statistics.fmean(kls), 5) if kls else None,
        "kl_median": round(statistics.median(kls), 5) if kls else None,
        "kl_p95": round(kls[int(0.95 * (len(kls) - 1))], 5) if kls else None,
        "top_kept_where_clear": f"{sum(bool(v.same_top) for v in clear)} of {len(clear)}",
        "reused_tokens": sum(v.reused or 0 for v in verdicts),
        "computed_tokens": sum(v.computed or 0 for v in verdicts),
        "faults": sum(bool(v.faults) for v in verdicts),
    }
