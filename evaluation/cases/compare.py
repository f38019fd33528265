# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation.cases.compare BEFORE.json AFTER.json``: two runs as a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvcomm_vllm.evaluation.cases.table import words

_COLUMNS = ["case", "#", "prompt", "cached", "now", "KL", "now", "top kept", "now", "said now"]
_SUMS = {
    "compared": "compared, since they used KV of others",
    "kl_mean": "KL, mean",
    "kl_median": "KL, median",
    "kl_p95": "KL, 95th percentile",
    "top_kept_where_clear": "top token kept where dense is clear",
    "reused_tokens": "tokens reused",
    "computed_tokens": "tokens computed",
}


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Sums, then a row per request of the later run; what a report does not say stays empty."""
    sums = [
        [told, str(before["summary"][key]), str(after["summary"][key])]
        for key, told in _SUMS.items()
    ]
    earlier = {(row["case"], row["number"]): row for row in before["requests"]}
    rows = []
    for row in after["requests"]:
        old = earlier.get((row["case"], row["number"]), {})
        pairs = [(_cached(r), _kl(r), _top(r)) for r in (old, row)]
        columns = [text for pair in zip(*pairs, strict=True) for text in pair]
        said = "; ".join(word for word in [row["declined"], *row["faults"]] if word)
        prompt = "" if row["prompt"] is None else str(row["prompt"])
        rows.append([row["case"], str(row["number"]), prompt, *columns, said])
    tables = words(["", "before", "now"], sums), words(_COLUMNS, rows)
    return "\n\n".join(tables) + "\n"


def _cached(row: dict[str, Any]) -> str:
    """Prompt tokens that were not computed."""
    if row.get("reused") is None:
        return ""
    return str(row["local"] + row["reused"])


def _kl(row: dict[str, Any]) -> str:
    return "" if row.get("kl") is None else f"{row['kl']:.4f}"


def _top(row: dict[str, Any]) -> str:
    if row.get("same_top") is None:
        return ""
    return "yes" if row["same_top"] else "NO" if row["clear"] else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    print(compare(json.loads(options.before.read_text()), json.loads(options.after.read_text())))


if __name__ == "__main__":
    main()
