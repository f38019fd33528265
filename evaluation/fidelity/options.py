# SPDX-License-Identifier: Apache-2.0
"""The command's options, checked before an engine starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.machine import serving_dtype
from kvcomm_vllm.evaluation.fidelity.points import anchor_points, points
from kvcomm_vllm.evaluation.fidelity.study import Study, choose
from kvcomm_vllm.evaluation.workloads import CASES, cases
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.user_file import user_cases

DTYPES = ("auto", "bfloat16", "float16", "float32")
PAPER_MEMORY_MB = 2048  # 20 anchors of some slots of a small model


@dataclass(frozen=True)
class Options:
    """A run in full: what is measured (``points`` are (mode, anchors)), on what, and where to."""

    model: str
    points: list[tuple[str, int]]
    studies: list[Study]
    tokens: int
    seed: int
    out: Path
    exact_sources: bool = False
    paper_gamma: float = 0.3
    first: int = 0
    dtype: str = "auto"

    @property
    def plugin(self) -> dict[str, Any]:
        """What the plugin has to be configured with for these modes."""
        if all(mode != "paper" for mode, _ in self.points):
            return {}
        return {"paper": {"memory_mb": PAPER_MEMORY_MB, "gamma": self.paper_gamma}}

    def settings(self) -> dict[str, Any]:
        """For the report; JSON-able."""
        return {
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "workloads": {study.workload: study.source for study in self.studies},
            "points": [{"mode": mode, "anchors": anchors} for mode, anchors in self.points],
            "prompts": len(self.studies[0].scored),
            "first": self.first,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "exact_sources": self.exact_sources,
            "plugin": self.plugin,
            "seed": self.seed,
        }


def _names(text: str, option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise DataError(f"{option}: names nothing")
    return names


def _numbers(text: str) -> list[int]:
    names = _names(text, "--anchors")
    if not all(name.isdecimal() for name in names):
        raise DataError(f"--anchors: {text!r} must be whole numbers of cases, 0 or more")
    return [int(name) for name in names]


def read_options(
    model: str,
    workload: str = "gsm8k3",
    modes: str = "rotate,seam16,anchor16",
    prompts: int = 8,
    first: int = 0,
    tokens: int = 24,
    anchors: str = "20",
    curve: bool = False,
    jsonl: Path | None = None,
    data: Path | None = None,
    exact_sources: bool = False,
    paper_gamma: float = 0.3,
    dtype: str = "auto",
    seed: int = 0,
    out: Path = Path("out/fidelity"),
) -> Options:
    """All that the user has said, checked.

    Raises:
        DataError: an option that cannot be used, or data that are missing or too few.
    """
    if dtype not in DTYPES:
        raise DataError(f"--dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
    measured = points(_names(modes, "--modes"), anchor_points(_numbers(anchors), curve))
    most = max(count for _, count in measured)
    if jsonl is not None:
        own = user_cases(jsonl)
        # a user's file is scored as far as it goes; what is left of it teaches
        chosen = [choose(jsonl.stem, jsonl.name, own, min(prompts, len(own)), most)]
    else:
        names = list(CASES) if workload == "all" else _names(workload, "--workload")
        chosen = []
        for name in names:
            found, source = cases(name, data, seed)
            chosen.append(choose(name, source, found, prompts, most, first))
    return Options(
        model=model,
        points=measured,
        studies=chosen,
        tokens=tokens,
        seed=seed,
        out=out,
        exact_sources=exact_sources,
        paper_gamma=paper_gamma,
        first=first,
        dtype=serving_dtype(dtype),
    )
