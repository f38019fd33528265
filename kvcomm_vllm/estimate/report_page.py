# SPDX-License-Identifier: Apache-2.0
"""The estimate as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from kvcomm_vllm import __version__
from kvcomm_vllm.estimate import numbers
from kvcomm_vllm.estimate.numbers import ratio, share
from kvcomm_vllm.estimate.run import Run
from kvcomm_vllm.estimate.style import page
from kvcomm_vllm.estimate.tally import Sums

AGENTS = 40
TITLE = "What these prompts would save"


def estimate_page(run: Run) -> str:
    """All of it, with the picture of one prompt."""
    parts = [f"<h1>{TITLE}</h1><p>{escape(numbers.headline(run))}</p>", _bars(run.tally.total)]
    parts += ["<h2>Prompt tokens by agent</h2>", _agents(run)]
    parts += ["<h2>Why tokens are computed</h2>", _losses(run)]
    if run.tally.copied:
        parts += ["<h2>Text that is shared but was re-encoded</h2>", _copied(run)]
    if run.picture is not None:
        parts += ["<h2>One prompt</h2>", run.picture.markup()]
    if run.tally.flaws.total:
        parts += ["<h2>Not counted</h2>", _skipped(run)]
    said = "".join(f"<p>{escape(note)}</p>" for note in numbers.notes(run))
    parts.append(f"<footer>{said}<p>kvcomm {__version__}</p></footer>")
    return page(TITLE, "".join(parts))


def _bars(total: Sums) -> str:
    rows = (
        ("prefix cache alone", (total.prefix_alone, 0, total.computed_alone)),
        ("with kvcomm", (total.local, total.reused, total.computed)),
    )
    made = []
    for name, counts in rows:
        strip = "".join(
            f'<b class="{kind}" style="flex:{count}" title="{kind}: {count:,} tokens"></b>'
            for kind, count in zip(("local", "reused", "computed"), counts, strict=True)
            if count
        )
        made.append(f'<div>{name}</div><div class="strip">{strip}</div>')
    legend = "".join(
        f'<li><i class="{kind}"></i>{text}</li>'
        for kind, text in (
            ("local", "prefix cache"),
            ("reused", "reused from other requests"),
            ("computed", "computed"),
        )
    )
    return f'<div class="bars">{"".join(made)}</div><ul class="legend">{legend}</ul>'


def _agents(run: Run) -> str:
    heads = ("agent", "requests", "tokens", "prefix alone", "local", "reused", "computed", "ratio")
    rows = [_row(name, sums) for name, sums in run.tally.largest(AGENTS)]
    rows.append(_row("all", run.tally.total, ' class="total"'))
    told = (
        '<p class="dim">Prefix alone: what vLLM finds in its cache without the plugin. Ratio: '
        "computed tokens with it, per computed token without.</p>"
    )
    return _table(heads, rows) + told


def _row(name: str, sums: Sums, kind: str = "") -> str:
    parts = (sums.prefix_alone, sums.local, sums.reused, sums.computed)
    cells = [name, f"{sums.requests:,}", f"{sums.prompt_tokens:,}"]
    cells += [f"{part:,} ({share(part, sums.prompt_tokens)})" for part in parts]
    return _tr([*cells, ratio(sums.ratio)], kind)


def _losses(run: Run) -> str:
    whole = run.tally.total.computed
    rows = [
        _tr([word, f"{tokens:,}", share(tokens, whole), meaning])
        for word, tokens, meaning in numbers.losses(run)
    ]
    return _table(("reason", "tokens", "of computed", "meaning"), rows)


def _copied(run: Run) -> str:
    rows = [
        _tr([name, f"{c.tokens:,}", f"{c.stretches:,}", f"{c.first_line:,}", c.advice])
        for name, c in sorted(run.tally.copied.items(), key=lambda item: -item[1].tokens)
    ]
    return _table(("rendering", "tokens", "places", "first line", "what to change"), rows)


def _skipped(run: Run) -> str:
    rows = [
        _tr([flaw.explanation, f"{count.number:,}", f"{count.first_line:,}", count.detail])
        for flaw, count in run.tally.flaws.counts.items()
    ]
    return _table(("kind", "requests", "first line", "there"), rows)


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    last = ("meaning", "what to change", "there")
    head = "".join(f"<th{' class=word' * (text in last)}>{text}</th>" for text in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _tr(cells: list[str], kind: str = "") -> str:
    last = len(cells) - 1
    words = not cells[last][:1].isdigit() and cells[last] != "–"
    made = "".join(
        f"<td{' class=word' * (number == last and words)}>{escape(cell)}</td>"
        for number, cell in enumerate(cells)
    )
    return f"<tr{kind}>{made}</tr>"
