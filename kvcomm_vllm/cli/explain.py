# SPDX-License-Identifier: Apache-2.0
"""`kvcomm explain` on the command line."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvcomm_vllm.cli.failure import fail

COARSE = (
    "Where it was reused is told to requests with a cache_salt alone, or with report: full "
    "(docs/requests.md)."
)


def explain(
    request: Annotated[
        Path,
        typer.Argument(
            help="File with the JSON body of a request, or - for stdin; with --record, the trace "
            "of a server (trace.file)."
        ),
    ],
    server: Annotated[str, typer.Option(help="A running server.")] = "http://localhost:8000",
    record: Annotated[
        str | None,
        typer.Option(help="Explain this request of a trace: its name, how it begins, or last."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the picture.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture as an image.")] = None,
) -> None:
    """What a running server reuses for one request, by place; it is served, for one token.

    Or what a server has reused for one that is in its trace.
    """
    from kvcomm_vllm.estimate import trace
    from kvcomm_vllm.estimate.flaws import EstimateError
    from kvcomm_vllm.estimate.live import explain as ask
    from kvcomm_vllm.estimate.style import page

    console = Console()
    try:
        body = _body(request) if record is None else {}
        found = ask(server, body) if record is None else trace.explain(request, record)
        report = found.report
        counts = ", ".join(f"{name} {report[name]:,}" for name in ("local", "reused", "computed"))
        console.print(f"{report['prompt_tokens']:,} tokens: {counts}", highlight=False)
        for word in report.get("declined") or ():
            console.print(f"declined: {word}", highlight=False, markup=False)
        for piece in found.picture.pieces if found.full else ():
            place = f"{piece.start:>8,} {piece.end:>8,}"
            console.print(f"{place}  {piece.kind.explanation}", highlight=False)
        if not found.full:
            console.print(COARSE)
        if html is not None:
            markup = f"<h1>What was reused</h1>{found.picture.markup()}"
            html.write_text(page("What was reused", markup), encoding="utf-8", errors="replace")
        if png is not None:
            from kvcomm_vllm.estimate.image import write_png

            write_png(found.picture, png)
    except (EstimateError, OSError) as error:
        fail(str(error))


def _body(request: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(request) == "-" else request.read_text(encoding="utf-8")
        body = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{request}: {error}")
    if not isinstance(body, dict):
        fail(f"{request}: must be a JSON object, the body of a request")
    return body
