# SPDX-License-Identifier: Apache-2.0
"""Proves on a CUDA machine what no other can show: `make gpu`, from the kernels up.

    python tools/prove_gpu.py --model FOLDER [--only STAGE ...] [--again] [--rehearse]

Each stage is a process with a limit of its own, so one that breaks ends no other. What has passed
is not run again with the same code on the same device; what failed is. Results go to
docs/results/gpu/NAME.json and NAME.md, logs and traces to --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_proof import page
from gpu_proof.dummy_model import SHAPES, make
from gpu_proof.stage import Outcome, Stage, carry_out
from gpu_proof.stages import ROOT, Setting, stages

from kvcomm_vllm.cli.machine import cpu_model, describe_versions, gpus

RESULTS = ROOT / "docs/results/gpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="with weights: `make model`")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--again", action="store_true", help="run what has passed, too")
    parser.add_argument("--rehearse", action="store_true", help="tiny and on a CPU: does it run?")
    args = parser.parse_args()
    devices = gpus()
    if not devices and not args.rehearse:
        print("No NVIDIA device is listed by nvidia-smi: nothing was run.", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    dummy = args.out / "model"
    make(SHAPES["tiny" if args.rehearse else "8b"], args.model, dummy)
    setting = Setting(args.model, dummy.resolve(), args.out, gpu=not args.rehearse)
    todo = list(stages(setting))
    unknown = set(args.only or ()) - {stage.name for stage in todo}
    if unknown:
        names = ", ".join(stage.name for stage in todo)
        print(f"--only: {', '.join(sorted(unknown))}: no stage; there are {names}", file=sys.stderr)
        return 2
    about = described(devices[0] if devices and setting.gpu else f"CPU rehearsal: {cpu_model()}")
    began = time.monotonic()
    outcomes = [
        outcome
        for stage in todo
        if (outcome := once(stage, args.out, about, args.again, args.only)) is not None
    ]
    about["minutes"] = round((time.monotonic() - began) / 60, 1)
    written = page.write(about, outcomes, RESULTS if setting.gpu else args.out)
    print(f"Written: {written}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def once(
    stage: Stage, out: Path, about: dict[str, Any], again: bool, only: list[str] | None
) -> Outcome | None:
    """Run a stage, or take what is there of the same code and device; None where neither is."""
    kept = out / f"{stage.name}.{page.name_of(about['device'])}.{about['commit']}.json"
    chosen = only is None or stage.name in only
    if kept.exists() and not (again and chosen):
        found = Outcome.load(kept)
        if found.status == "passed" or not chosen:
            print(f"{stage.name}: {found.status} before", flush=True)
            return found
    if not chosen:
        return None
    print(f"{stage.name}: {stage.question} ...", flush=True)
    outcome = carry_out(stage, out)
    outcome.save(kept)
    told = page.short(outcome.figures)
    print(f"  {outcome.status} after {outcome.seconds:g} s {told} {outcome.why}", flush=True)
    return outcome


def described(device: str) -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": device,
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        **describe_versions(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
