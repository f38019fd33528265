# SPDX-License-Identifier: Apache-2.0
"""What precision alone costs: plain vLLM in bfloat16 against plain vLLM in float32, measured as
``kvcomm fidelity`` measures reuse, on its prompts.

``python benchmarks/precision.py --model DIR --data DIR [--first N] [--prompts N] [--json F]``
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from kvcomm_vllm.cli.fidelity.environment import prepare_environment
from kvcomm_vllm.cli.machine import describe_machine, describe_versions

TOKENS = 24
WORKLOAD = "gsm8k3"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prepare_environment(options.model)
    from kvcomm_vllm.cli.fidelity.bench import Bench
    from kvcomm_vllm.cli.fidelity.divergence import divergence
    from kvcomm_vllm.cli.fidelity.modes import DENSE
    from kvcomm_vllm.cli.fidelity.workloads import workload

    cases, _ = workload(WORKLOAD).cases(options.data, seed=0)
    cases = cases[options.first : options.first + options.prompts]
    exact = Bench(options.model, dtype="float32")
    exact.rehearse(cases)
    prompts = [exact.script(case).prompts[-1] for case in cases]
    truth = [exact.run(p, DENSE, "dense", tokens=TOKENS, listen=TOKENS) for p in prompts]
    exact.close()
    rounded = Bench(options.model, dtype="bfloat16")
    found = []
    for prompt, run in zip(prompts, truth, strict=True):
        count = len(run.tokens)
        other = rounded.run(prompt, DENSE, "dense", tokens=count, force=run.tokens, listen=count)
        found.append(divergence(run.steps, other.steps))
    rounded.close()
    clear = [one.clear for one in found if one.clear is not None]
    result = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "workload": WORKLOAD,
        "first": options.first,
        "kl1": fmean(one.kl1 for one in found),
        "kl_mean": fmean(one.kl_mean for one in found),
        "top1": fmean(one.top1 for one in found),
        "clear": fmean(clear),
        "prompts": [asdict(one) for one in found],
    }
    print({name: result[name] for name in ("kl1", "kl_mean", "top1", "clear")})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
