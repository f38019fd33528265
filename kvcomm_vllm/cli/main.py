# SPDX-License-Identifier: Apache-2.0
"""The `kvcomm` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm import __version__
from kvcomm_vllm.cli.bench.command import bench
from kvcomm_vllm.cli.extras import lacking
from kvcomm_vllm.cli.failure import errors, fail
from kvcomm_vllm.cli.fidelity.command import fidelity

DEMO_PACKAGES = ("openai", "matplotlib", "yaml", "prometheus_client")
DEFAULT_QUESTIONS, QUICK_QUESTIONS = 2, 1
DEFAULT_ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 128, 96

app = typer.Typer(
    name="kvcomm",
    help="Agents on a vLLM server reuse each other's KV cache: check, see, measure how it works.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
console = Console()
app.command()(fidelity)
app.command()(bench)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"kvcomm-vllm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Reuse of KV cache between cooperating agents in vLLM."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of the model.")],
    quick: Annotated[bool, typer.Option("--quick", help="One question, short answers.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the report, the picture, and the servers' logs.")
    ] = Path("out/demo"),
    questions: Annotated[
        int | None,
        typer.Option(min=1, help=f"Timed questions (default: {DEFAULT_QUESTIONS})."),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(min=8, help=f"Length of every note (default: {DEFAULT_ANSWER_TOKENS})."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file for --kvcomm-config; without it, the defaults and no audits."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="GSM8K-style JSONL instead of the packaged questions.")
    ] = None,
    side_by_side: Annotated[
        bool | None,
        typer.Option(
            "--side-by-side/--one-at-a-time",
            help="Keep both servers running, or save memory (default: side by side on a CPU).",
        ),
    ] = None,
    server_arg: Annotated[
        list[str] | None,
        typer.Option(help="Extra argument for both servers, e.g. --server-arg=--dtype=float32."),
    ] = None,
) -> None:
    """Five agents work on word problems, with kvcomm and with plain vLLM; prints one table."""
    if lack := lacking(DEMO_PACKAGES, "demo"):
        fail(f"the demo needs {lack}")
    from kvcomm_vllm.cli.client import RequestError
    from kvcomm_vllm.cli.demo import run_demo
    from kvcomm_vllm.cli.machine import is_cpu_build
    from kvcomm_vllm.cli.rows import DATA, DataError
    from kvcomm_vllm.cli.server import ServerError
    from kvcomm_vllm.cli.stage import DemoOptions
    from kvcomm_vllm.config import ConfigError

    options = DemoOptions(
        model=model,
        out=out,
        questions=questions or (QUICK_QUESTIONS if quick else DEFAULT_QUESTIONS),
        answer_tokens=answer_tokens or (QUICK_ANSWER_TOKENS if quick else DEFAULT_ANSWER_TOKENS),
        side_by_side=is_cpu_build() if side_by_side is None else side_by_side,
        data=data,
        config=config or Path(str(DATA / "demo.yaml")),
        server_args=server_arg or [],
    )
    try:
        run_demo(options, console)
    except (ServerError, RequestError, DataError, ConfigError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        errors.print("Interrupted; the server has been stopped.")
        raise typer.Exit(130) from None


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="Also check this configuration file.")] = None,
    model: Annotated[str | None, typer.Option(help="Also check this model folder.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Also check a running server, e.g. http://localhost:8000.")
    ] = None,
) -> None:
    """Check Python, torch, vLLM, the plugin, and optionally a config file, a model, a server."""
    from kvcomm_vllm.cli.doctor import Status, render_checks, run_checks

    with console.status("Checking"):
        checks = run_checks(config=config, model=model, server=server)
    console.print(render_checks(checks))
    if any(check.status is Status.FAIL for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `kvcomm` script."""
    app()


if __name__ == "__main__":
    main()
