# SPDX-License-Identifier: Apache-2.0
"""What the table says of each kind of results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from xml.etree import ElementTree

from gpu_proof.stage import Figures
from kvcomm_vllm.evaluation.bench.records import LOCKSTEP, RECORDS


def tests(path: Path) -> Figures:
    """Counts of a JUnit file of pytest, and the names of what failed."""
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in root.iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if not passed:
        raise ValueError("no test passed")
    return {"passed": passed, "skipped": counts["skipped"], "broken": broken}


def kernels(path: Path) -> Figures:
    """Share of a plain copy's speed, by shape, kernel and provider."""
    found = json.loads(path.read_text(encoding="utf-8"))
    shares = {
        f"{row['shape']} {row['kernel']} {row['provider']}": row["share_of_copy"]
        for row in found["rows"]
    }
    if not shares:
        raise ValueError("nothing was measured")
    return {"share of copy": shares}


def plain(path: Path) -> Figures:
    """Results that are figures already."""
    found: Figures = json.loads(path.read_text(encoding="utf-8"))
    return found


def agents(folder: Path) -> Figures:
    """Median TTFT of each column's last agent, and how much sooner it is than ``plain``."""
    times: dict[str, dict[int, list[float]]] = {}
    for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (row["kind"], row.get("phase")) == ("call", LOCKSTEP) and not row["warmup"]:
            times.setdefault(row["column"], {}).setdefault(row["index"], []).append(row["ttft_ms"])
    if "plain" not in times:
        raise ValueError("nothing was measured")
    last = max(times["plain"])
    medians = {name: statistics.median(calls[last]) for name, calls in times.items()}
    return {
        "agents": last + 1,
        "tasks": len(times["plain"][last]),
        "ttft ms": {name: round(ms, 2) for name, ms in medians.items()},
        "sooner": {
            name: round(medians["plain"] / ms, 2) for name, ms in medians.items() if name != "plain"
        },
    }
