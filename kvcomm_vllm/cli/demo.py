# SPDX-License-Identifier: Apache-2.0
"""`kvcomm demo` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm.cli.extras import CLIENT, PICTURE, measuring


def demo(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of the model.")],
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
        int | None, typer.Option(min=1, help="Timed questions (default: 1; 2 with --full).")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(min=8, help="Length of every note (default: 48; 128 with --full)."),
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
    """Five agents work on word problems, with kvcomm and with plain vLLM; prints one table."""
    with measuring("demo", (*CLIENT, *PICTURE)):
        from kvcomm_vllm.evaluation.demo.options import read_options
        from kvcomm_vllm.evaluation.demo.run import run_demo

        options = read_options(
            model, out, questions, answer_tokens, config, data, server_arg, full=full, quick=quick
        )
        run_demo(options, Console())
