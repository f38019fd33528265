# SPDX-License-Identifier: Apache-2.0
"""The `kvcomm` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm import __version__
from kvcomm_vllm.cli.bench import bench
from kvcomm_vllm.cli.demo import demo
from kvcomm_vllm.cli.estimate import estimate
from kvcomm_vllm.cli.explain import explain
from kvcomm_vllm.cli.fidelity import fidelity

app = typer.Typer(
    name="kvcomm",
    help="Agents on a vLLM server reuse each other's KV cache: check, see, measure how it works.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
console = Console()
for command in (demo, estimate, explain, fidelity, bench):
    app.command()(command)


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
