# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation.fidelity.merge NAME FILE...``: probes of several runs as one.

A run may take a few probes at a time (``--first``, ``--prompts``), or a mode that needs an engine
of its own; a probe that was measured twice under a mode counts once, as the later file has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomm_vllm.evaluation.fidelity.probe_report import write_probes
from kvcomm_vllm.evaluation.fidelity.probes import ProbeScore
from kvcomm_vllm.evaluation.workloads.rows import DataError

SAME = ("model", "dtype", "seed", "versions")  # of runs that may be put together


def merge(files: Sequence[Path]) -> tuple[dict[str, Any], list[ProbeScore]]:
    """What the runs have in common, and their scores by kind and mode.

    Raises:
        DataError: runs of different models, precisions, seeds or versions.
    """
    settings: dict[str, Any] = {}
    found: dict[tuple[str, str, str], ProbeScore] = {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        own = {key: content["settings"].get(key) for key in SAME}
        if settings and own != settings:
            raise DataError(f"{file}: {own} are not the settings of {files[0]}: {settings}")
        settings = own
        columns = {name: json.loads(text) for name, text in content["prompts"].items()}
        for row in zip(*columns.values(), strict=True):
            score = ProbeScore(**dict(zip(columns, row, strict=True)))
            found[score.workload, score.mode, score.case] = score
    kinds, modes = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    order = {key: (kinds.index(key[0]), modes.index(key[1])) for key in found}
    return settings, [found[key] for key in sorted(found, key=order.__getitem__)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", type=Path, help="NAME.json and NAME.md are written")
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    settings, scores = merge(args.files)
    write_probes(args.name.parent, args.name.name, settings, scores)


if __name__ == "__main__":
    main()
