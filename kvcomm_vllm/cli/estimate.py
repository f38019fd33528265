# SPDX-License-Identifier: Apache-2.0
"""`kvcomm estimate` on the command line."""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from kvcomm_vllm.cli.failure import errors, fail


def estimate(
    log: Annotated[
        Path,
        typer.Argument(
            help="JSONL of requests, one a line (docs/estimate.md); .gz, or - for stdin."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or Hugging Face id of the model, for its tokenizer."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The same of another tokenizer than the model's own.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template instead of its own.")
    ] = None,
    kvcomm_config: Annotated[
        Path | None, typer.Option(help="YAML file of the plugin's settings; without it, defaults.")
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=1024, help="KV that fits into the engine; vLLM logs it at start.")
    ] = 400_000,
    block_size: Annotated[
        int, typer.Option(min=16, max=32, help="Tokens per page: 16 or 32.")
    ] = 16,
    served: Annotated[
        str,
        typer.Option(help="Model name whose requests count, or all; default: that of the first."),
    ] = "",
    cache_salt: Annotated[
        str | None, typer.Option(help="For requests without a cache_salt of their own.")
    ] = None,
    line: Annotated[
        int | None, typer.Option(min=1, help="Draw the prompt of this line (default: the most).")
    ] = None,
    text: Annotated[
        bool, typer.Option(help="Whether the picture shows what the prompt says.")
    ] = True,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers as JSON.")
    ] = None,
) -> None:
    """What your own prompts would save: a log through the real planner, without a server."""
    name = tokenizer or model
    if name is None:
        fail("name the model whose tokenizer counts: --model FOLDER_OR_ID")
    if block_size not in (16, 32):
        fail("--block-size: 16 or 32")
    for path in (html, json_file):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"{path}: there is no such folder")
    from kvcomm_vllm.config import ConfigError, KVCommConfig
    from kvcomm_vllm.config.file import load_file
    from kvcomm_vllm.guards.version import check_vllm

    try:
        config = load_file(kvcomm_config) if kvcomm_config else KVCommConfig()
    except ConfigError as error:
        fail(str(error))
    if config.mode == "paper":
        fail("mode paper decides by what a model computes, so it cannot be estimated")
    if problem := check_vllm():
        fail(problem)
    console = Console()
    with errors.status("Loading vLLM's scheduler and the tokenizer") as status:
        from kvcomm_vllm.estimate.encoder import Encoder
        from kvcomm_vllm.estimate.flaws import EstimateError
        from kvcomm_vllm.estimate.numbers import mapping
        from kvcomm_vllm.estimate.report_page import estimate_page
        from kvcomm_vllm.estimate.run import Options, Run
        from kvcomm_vllm.estimate.screen import render

        options = Options(config, cache_tokens, block_size, served, cache_salt, line, text)
        try:
            run = Run(options, Encoder.load(name, chat_template))
            run.read(log, lambda line, count: status.update(f"line {line:,}, {count:,} requests"))
        except EstimateError as error:
            _nothing(str(error))
        except KeyboardInterrupt:
            errors.print("Interrupted.")
            raise typer.Exit(130) from None
    for part in render(run):
        console.print(part, highlight=False)
    try:
        if html is not None:
            html.write_text(estimate_page(run), encoding="utf-8", errors="replace")
        if json_file is not None:
            content = json.dumps(mapping(run), indent=1, ensure_ascii=True)
            json_file.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        fail(str(error))


def _nothing(message: str) -> NoReturn:
    text = f"[bold red]Error:[/bold red] {escape(message)}"
    errors.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
