# SPDX-License-Identifier: Apache-2.0
"""`kvcomm demo` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm.cli.extras import CLIENT, PICTURE, measuring


def demo(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of the model.")],
    scene: Annotated[
        str,
        typer.Option(
            help="agents: five agents read each other's notes; edit: one agent, whose prompt is "
            "edited near its head eight times."
        ),
    ] = "agents",
    quick: Annotated[
        bool, typer.Option("--quick", help="One server, one question, short notes (the default).")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Plain vLLM on a server of its own, longer notes.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the report, the picture, and the servers' logs.")
    ] = Path("out/demo"),
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Timed questions or sessions (1; --full: 2 or 3)."),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of every answer (agents: 40, 128 with --full, at least 8; edit: 8)."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file for --kvcomm-config; without it, the defaults and no audits."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="GSM8K-style JSONL instead of the packaged questions.")
    ] = None,
    server_arg: Annotated[
        list[str] | None,
        typer.Option(help="Extra argument of the servers, e.g. --server-arg=--dtype=float32."),
    ] = None,
) -> None:
    """Agents at work, with kvcomm and with plain vLLM; prints one table."""
    with measuring("demo", (*CLIENT, *PICTURE)):
        from kvcomm_vllm.evaluation.demo.options import read_options
        from kvcomm_vllm.evaluation.demo.run import run_demo

        options = read_options(
            model,
            out,
            questions,
            answer_tokens,
            config,
            data,
            server_arg,
            scene=scene,
            full=full,
            quick=quick,
        )
        run_demo(options, Console())
