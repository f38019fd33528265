# SPDX-License-Identifier: Apache-2.0
"""`kvcomm fidelity` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm.cli.extras import PICTURE, measuring

ENGINE = ("torch", "vllm")


def fidelity(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of the model.")],
    workload: Annotated[
        str,
        typer.Option(
            help="gsm8k3, gsm8k5, groupchat, rag, judge, clock, compaction, pruned, tools, repo, "
            "probes, chains; several with commas, or all."
        ),
    ] = "gsm8k3",
    modes: Annotated[
        str, typer.Option(help="What is compared with dense: rotate, seam16, anchor16, ...")
    ] = "rotate,seam16,anchor16",
    prompts: Annotated[int, typer.Option(min=1, help="Scored prompts per workload.")] = 8,
    first: Annotated[
        int, typer.Option(min=0, help="Number of the first scored prompt in the data.")
    ] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Compared tokens per prompt.")] = 24,
    anchors: Annotated[
        str, typer.Option(help="Cases taught before scoring; several numbers with commas.")
    ] = "20",
    curve: Annotated[
        bool, typer.Option("--curve", help="Also 1, 2, 5 and 10 anchors, below the largest number.")
    ] = False,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help='Your own prompts instead: {"agents": [{"system": ..., "user": ...}, ...]} a '
            "line; {1} in a user text stands for the first agent's answer, the last is scored."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the data (docs/bench.md; default: a packaged sample)."),
    ] = None,
    exact_sources: Annotated[
        bool,
        typer.Option("--exact-sources", help="Only the scored agent reuses, the others are dense."),
    ] = False,
    idle_seconds: Annotated[
        float,
        typer.Option(
            min=0.0, help="How long nobody asks anything, behind each agent but the last."
        ),
    ] = 0.0,
    paper_gamma: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The gate of mode paper; 1 = all may pass.")
    ] = 0.3,
    dtype: Annotated[
        str,
        typer.Option(
            help="vLLM's --dtype; float32 takes rounding out of the comparison (auto: the model's "
            "own, but float32 on CPUs without bf16 instructions)."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="For shuffled orders.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the numbers and the picture.")] = Path(
        "out/fidelity"
    ),
) -> None:
    """How far are answers with reused KV from dense ones? One engine, any modes, one table."""
    given = locals()
    with measuring("fidelity", (*ENGINE, *PICTURE)):
        from kvcomm_vllm.evaluation.fidelity.options import read_options

        options = read_options(**given)
        from kvcomm_vllm.evaluation.fidelity.environment import prepare_environment

        prepare_environment(model)
        from kvcomm_vllm.evaluation.fidelity.run import run_fidelity

        run_fidelity(options, Console())
