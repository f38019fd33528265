# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcomm_vllm.cli.extras import CLIENT, measuring

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
    workloads: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            help="math, coding, rag, mmlu, groupchat, judge, toolcalls, synthetic, agents, crowd, "
            "clock, compaction, pruned, tools, repo; repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Timed tasks per workload, after one to warm up.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="plain_nocache, plain, rotate, seam, seam4, anchor, paper, with commas."),
    ] = None,
    endpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint", help="NAME=URL[,model] of any OpenAI server, as a column; repeatable."
        ),
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
    burst: Annotated[
        int | None, typer.Option(min=0, help="Under load, too: so many tasks arriving at once.")
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
        int | None,
        typer.Option(min=1, help="Length of the shared input (synthetic), of an edited prompt."),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer of each agent.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the plugin's settings; without it, defaults.")
    ] = None,
    server_args: Annotated[
        list[str] | None,
        typer.Option(
            "--server-arg",
            help="Extra argument for both servers, e.g. --server-arg=--dtype=float32.",
        ),
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
    options = {name: value for name, value in locals().items() if name != "context"}
    given = {
        option.opts[0]
        for option in context.command.params
        if (source := context.get_parameter_source(str(option.name)))
        and source.name == "COMMANDLINE"
    }
    with measuring("bench", CLIENT, f"To go on: kvcomm bench --resume --out {out}"):
        from kvcomm_vllm.evaluation.bench.run import run_command

        run_command(given, Console(), **options)
