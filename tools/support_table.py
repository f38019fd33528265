# SPDX-License-Identifier: Apache-2.0
"""Make docs/support.md of what tests have recorded in docs/results/support.json.

Usage: python tools/support_table.py

The record comes from ``pytest -m support --record-support docs/results/support.json``; rows are the
families of tests/tiny_families.py, architectures that are refused, and what else tests name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs/results/support.json"
PAGE = ROOT / "docs/support.md"
COLUMNS = ("reuse", "exactness", "layer 0", "memory")
MIXED = "mixed"
REFUSED = "refused: "
Row = Mapping[str, Any]

READ_ONLY = {
    "CUDA's pages and kernels": "[experiments/cuda.md](experiments/cuda.md)",
    "vLLM 0.29, 0.31 and 0.33": "[versions.md](versions.md)",
}

HEAD = """# What has been run

Made by `make support` of what tests have recorded ([results/support.json](results/support.json)):
real engines on a CPU, with tiny random models of each family (`tests/tiny_families.py`).

* **reuse**: the engine says that reuse is on, its check at start has passed, and shared text was
  reused.
* **exactness**: text that the plugin computes itself, and requests that ask for exact answers,
  get the tokens that a dense prefill gives.
* **layer 0**: moved keys of the first layer, which sees no context, are those of a dense prefill
  up to rounding, and moved values are equal.
* **KV**: what a request as long as the model allows holds while it decodes, divided by what it
  holds in plain vLLM, as vLLM reckons it for the same layers.
  Where it is more, two of three layers have a window of 64 of 2,048 tokens, and keep all KV.
  In rows with `hybrid_kv_cache` that setting is true: vLLM drops what lies behind such a window, as
  in plain vLLM, for a [price](limits.md#layers-with-windows).

"passed" and "on" are outcomes of tests; a dash means that no test asks.
"""


def families() -> dict[str, str]:
    """Row -> what transformers calls the model."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from tiny_families import FAMILIES, HYBRID
    finally:
        sys.path.pop(0)
    return {name: family.model_type for name, family in {**FAMILIES, **HYBRID}.items()}


def page(record: Mapping[str, Mapping[str, Row]], known: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        record: vLLM's version -> row -> column -> outcome.
        known: see :func:`families`.
    """
    record = {version.removesuffix(".0"): found for version, found in record.items()}
    rows = dict.fromkeys(
        row
        for version in record.values()
        for row, found in version.items()
        if {*COLUMNS} & {*found}
    )
    refused = [row for row in rows if _is_refused(record, row)]
    options = [row for row in rows if row not in known and row not in refused]
    titles = ["family", "tiny model", *COLUMNS[:3], "KV", "vLLM"]
    told = [titles[0], *titles[2:5], titles[6]]
    parts = [
        HEAD,
        "## Model families\n",
        _table(titles, ([known[row], row, *cells] for row, cells in _cells(record, known))),
        "## Options of engines\n",
        _table(["option", *told[1:]], ([row, *c[:3], c[4]] for row, c in _cells(record, options))),
        "## A thousand mixed requests\n",
        "`make soak-models`: several tenants quote, edit, go on and try again, in a cache that is\n"
        "too small for them.\n"
        "Every answer that was to be exact is plain vLLM's; nothing stays behind.\n",
        _table(["engine", "outcome", "vLLM"], _mixed(record)),
        "## Refused\n",
        "Such engines say why once, and serve exactly.\n"
        "Of architectures (`...ForCausalLM`) no engine was started: arguments were read.\n",
        _table(
            ["model", "reason", "vLLM"],
            ([row, _reason(c[0]), c[4]] for row, c in _cells(record, refused)),
        ),
        "## Read only\n",
        _table(["what", "where"], READ_ONLY.items()),
    ]
    return "\n".join(parts)


def _cells(
    record: Mapping[str, Mapping[str, Row]], rows: Iterable[str]
) -> Iterable[tuple[str, list[str]]]:
    """Row by row what was found, a line for versions with the same outcomes."""
    for row in rows:
        versions: dict[tuple[str, ...], list[str]] = {}
        for version in sorted(record):
            found = record[version].get(row)
            if found is not None:
                outcomes = tuple(_shown(found.get(column)) for column in COLUMNS)
                versions.setdefault(outcomes, []).append(version)
        for outcomes, same in versions.items():
            yield row, [*outcomes, " ".join(same)]


def _mixed(record: Mapping[str, Mapping[str, Row]]) -> Iterable[list[str]]:
    for version in sorted(record):
        for row, found in record[version].items():
            if MIXED in found:
                yield [row, str(found[MIXED]), version]


def _shown(outcome: Any) -> str:
    if isinstance(outcome, float):
        return f"{outcome:.2f}x"
    return "-" if outcome is None else str(outcome)


def _is_refused(record: Mapping[str, Mapping[str, Row]], row: str) -> bool:
    told = (version.get(row, {}).get("reuse") for version in record.values())
    return any(str(outcome).startswith(REFUSED) for outcome in told)


def _reason(outcome: str) -> str:
    return f"`{outcome.removeprefix(REFUSED)}`" if outcome.startswith(REFUSED) else outcome


def _table(titles: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    PAGE.write_text(page(json.loads(RECORD.read_text()), families()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
