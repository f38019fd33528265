# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench` on the command line; what is heavy is imported once it is needed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm.cli.extras import lacking
from kvcomm_vllm.cli.failure import errors, fail
from kvcomm_vllm.cli.rows import DataError

PACKAGES = ("openai", "plotly", "jinja2", "prometheus_client", "psutil")
OUT = Path("out/bench")


def bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Local folder or Hugging Face id of the model.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Ends within 10 minutes on 2 cores (the default).")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All workloads, columns and phases; hours on a CPU.")
    ] = False,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="math, coding, rag, mmlu, groupchat, judge, toolcalls or synthetic; repeatable."
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Timed tasks per workload, after one to warm up.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="plain_nocache, plain, rotate, seam, anchor, paper, with commas."),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL[,model] of any OpenAI server, as a column; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice and order of tasks, arrivals.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the data (docs/bench.md; default: a packaged sample)."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.0, help="Also under load: tasks arriving per second.")
    ] = None,
    load_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="How long tasks arrive, on each column.")
    ] = None,
    stream: Annotated[
        int | None, typer.Option(min=0, help="Also a row of so many novel tasks: plain, anchor.")
    ] = None,
    agents: Annotated[
        int | None, typer.Option(min=1, help="Agents, of workloads that let one choose.")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of each agent's instructions (synthetic).")
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the shared input (synthetic).")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer of each agent.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the plugin's settings; without it, defaults.")
    ] = None,
    server_arg: Annotated[
        list[str] | None,
        typer.Option(help="Extra argument for both servers, e.g. --server-arg=--dtype=float32."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, report and logs.")] = OUT,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out, with the options it has."),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the report of this folder again; nothing is run.")
    ] = None,
) -> None:
    """Workloads on plain vLLM and on every mode of the plugin, side by side, in one report."""
    if lack := lacking(PACKAGES, "bench"):
        fail(f"kvcomm bench needs {lack}")
    from kvcomm_vllm.cli.bench.options import read_options
    from kvcomm_vllm.cli.bench.resume import options_of
    from kvcomm_vllm.cli.client import RequestError
    from kvcomm_vllm.cli.server import ServerError
    from kvcomm_vllm.config import ConfigError

    console = Console()
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    sizes = {
        "agents": agents,
        "prefix_tokens": prefix_tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    try:
        if report is not None:
            _only(given, "report")
            _write_report(report, console)
            return
        if resume:
            _only(given, "resume", "out")
            options = options_of(out)
        else:
            if model is None:
                raise DataError("--model is needed")
            if quick and full:
                raise DataError("--quick and --full are two things")
            options = read_options(
                model,
                out,
                full=full,
                workloads=workload,
                tasks=tasks,
                columns=columns,
                endpoints=endpoint,
                seed=seed,
                data=data,
                rate=rate,
                load_seconds=load_seconds,
                stream=stream,
                sizes={name: value for name, value in sizes.items() if value is not None},
                config=config,
                server_args=server_arg,
            )
        from kvcomm_vllm.cli.bench.run import run_bench

        run_bench(options, console)
        _write_report(options.out, console)
    except (ServerError, RequestError, DataError, ConfigError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        errors.print("Interrupted; the servers have been stopped.")
        errors.print(f"To go on: kvcomm bench --resume --out {out}", highlight=False, markup=False)
        raise typer.Exit(130) from None


def _only(given: set[str], *allowed: str) -> None:
    """
    Raises:
        DataError: another option was given, which would have no effect.
    """
    for name in sorted(given - set(allowed)):
        option = name.replace("_", "-")
        raise DataError(f"--{option} has no place beside --{allowed[0]}")


def _write_report(folder: Path, console: Console) -> None:
    from kvcomm_vllm.cli.bench.report import write_report

    for path in write_report(folder):
        console.print(f"Written: {path}", highlight=False, soft_wrap=True, markup=False)
