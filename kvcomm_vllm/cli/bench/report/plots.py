# SPDX-License-Identifier: Apache-2.0
"""The page's plots, drawn by plotly in the browser."""

from __future__ import annotations

from collections.abc import Iterator

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvcomm_vllm.cli.bench.report.content import Content
from kvcomm_vllm.cli.bench.report.latency import speedup
from kvcomm_vllm.cli.bench.report.numbers import points, share
from kvcomm_vllm.cli.bench.report.pairs import ALL, calls_of, pair_calls
from kvcomm_vllm.cli.bench.report.plot import PLOT_PX, Plot, colour_of, plot_of
from kvcomm_vllm.cli.bench.report.read import NO_CACHE, PLAIN, Run

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
BAR_PX, GROUP_PX, FRAME_PX = 13, 12, 110


def all_plots(content: Content, run: Run) -> list[Plot]:
    """Those for which there are records."""
    plots = [*(_agents(content, workload) for workload in content.workloads)]
    plots += [*_saving(content, run), *_quality(content), *_decay(content), *_memory(content)]
    return plots


def _agents(content: Content, workload: str) -> Plot:
    figure = go.Figure()
    rows = [row for row in content.latency if row.workload == workload]
    for row in rows:
        figure.add_bar(
            name=row.column,
            y=list(row.agents),
            x=list(row.agents.values()),
            orientation="h",
            marker_color=colour_of(row.column, content.columns),
            texttemplate="%{x:,.0f}",
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}, " + row.column + ": %{x:,.1f} ms<extra></extra>",
        )
    agents = dict.fromkeys(agent for row in rows for agent in row.agents)
    height = FRAME_PX + len(agents) * (GROUP_PX + BAR_PX * len(rows))
    figure.update_layout(barmode="group", bargap=0.2, margin_r=48)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="ms, median", rangemode="tozero")
    note = "Median over tasks, agents in the order of speaking. Shorter is better."
    return plot_of(figure, f"agents-{workload}", f"Time to first token: {workload}", note, height)


def _saving(content: Content, run: Run) -> Iterator[Plot]:
    figure = go.Figure()
    for column in (name for name in content.columns if name not in (PLAIN, NO_CACHE)):
        for number, workload in enumerate(content.workloads):
            x, y, names = _agent_savings(run, workload, column)
            figure.add_scatter(
                name=column,
                legendgroup=column,
                showlegend=number == 0,
                x=x,
                y=y,
                text=names,
                mode="markers",
                marker={
                    "size": 10,
                    "symbol": SYMBOLS[number % len(SYMBOLS)],
                    "color": colour_of(column, content.columns),
                },
                hovertemplate="%{text}<br>%{x:,.0f} tokens, %{y:.1%} saved<extra></extra>",
            )
    if not figure.data:
        return
    figure.update_xaxes(title="prompt tokens, mean", rangemode="tozero")
    figure.update_yaxes(title="saved against plain", tickformat=".0%")
    signs = ", ".join(
        f"{workload} {SYMBOLS[number % len(SYMBOLS)]}"
        for number, workload in enumerate(content.workloads)
    )
    note = (
        "A point per agent: share of plain vLLM's times to first token (prefix caching on) that "
        f"was saved, over all its calls. Below zero is slower. {signs}."
    )
    yield plot_of(figure, "saving", "Saving against prompt length", note)


def _agent_savings(
    run: Run, workload: str, column: str
) -> tuple[list[float], list[float], list[str]]:
    calls = calls_of(run, workload, column)
    pairs = pair_calls(calls, calls_of(run, workload, PLAIN))
    x, y, names = [], [], []
    for agent in dict.fromkeys(call.agent for call in sorted(calls, key=lambda c: c.index)):
        found = [(call, other) for call, other in pairs if call.agent == agent]
        ratio = speedup(found)
        if ratio:
            x.append(sum(call.prompt_tokens for call, _ in found) / len(found))
            y.append(1 - 1 / ratio.value)
            names.append(f"{column}, {workload}, {agent}")
    return x, y, names


def _quality(content: Content) -> Iterator[Plot]:
    figure = go.Figure()
    times = {(row.workload, row.column): row.every.ratios.get(PLAIN) for row in content.latency}
    for row in content.quality:
        ratio, change = times.get((row.workload, row.column)), row.difference
        if row.workload == ALL or ratio is None or change is None:
            continue
        ends = (change.low, change.high)
        low, high = (change.value if end is None else end for end in ends)
        number = content.workloads.index(row.workload)
        figure.add_scatter(
            name=f"{row.column}, {row.workload}",
            x=[1 - 1 / ratio.value],
            y=[100 * change.value],
            error_y={
                "array": [100 * (high - change.value)],
                "arrayminus": [100 * (change.value - low)],
                "thickness": 1.2,
            },
            mode="markers",
            marker={
                "size": 11,
                "symbol": SYMBOLS[number % len(SYMBOLS)],
                "color": colour_of(row.column, content.columns),
            },
            hovertemplate=f"{row.column}, {row.workload}<br>{points(change)} points, "
            f"{share(1 - 1 / ratio.value)} saved<extra></extra>",
        )
    if not figure.data:
        return
    figure.update_xaxes(title="saved against plain", tickformat=".0%")
    figure.update_yaxes(title="score minus plain's, points", zeroline=True)
    note = "A point per workload and column, with the 95% interval. Right and high is better."
    yield plot_of(figure, "quality", "Quality against saving", note, PLOT_PX + 60)


def _decay(content: Content) -> Iterator[Plot]:
    figure = go.Figure()
    for row in content.stream:
        colour = colour_of(row.column, content.columns)
        name = f"{row.column}, {row.workload}"
        figure.add_scatter(
            name=f"{name}, each task",
            x=list(range(1, row.tasks + 1)),
            y=row.savings,
            mode="markers",
            marker={"size": 4, "color": colour, "opacity": 0.45},
            hovertemplate="task %{x}: %{y:.1%} saved<extra></extra>",
        )
        figure.add_scatter(
            name=f"{name}, window",
            x=[end for window in row.windows for end in (window.first, window.last, None)],
            y=[end for window in row.windows for end in (window.saving, window.saving, None)],
            mode="lines",
            line={"width": 4, "color": colour},
            hovertemplate="%{y:.1%} saved in this window<extra></extra>",
        )
    if not figure.data:
        return
    figure.update_xaxes(title="task, after warm-up")
    figure.update_yaxes(title="saved against plain", tickformat=".0%")
    note = "Novel tasks one after the other. The lines should stay level."
    yield plot_of(figure, "decay", "Over a long stream", note)


def _memory(content: Content) -> Iterator[Plot]:
    parts = (("resident MB", 1, ",.0f"), ("KV pages in use", 2, ".0%"), ("anchors", 3, ",.0f"))
    shown = [
        part
        for part in parts
        if any(look[part[1]] is not None for row in content.memory for look in row.series)
    ]
    if not shown:
        return
    figure = make_subplots(rows=len(shown), shared_xaxes=True, vertical_spacing=0.06)
    for line, (title, place, form) in enumerate(shown, 1):
        for row in content.memory:
            figure.add_scatter(
                name=row.server,
                legendgroup=row.server,
                showlegend=line == 1,
                x=[look[0] for look in row.series],
                y=[look[place] for look in row.series],
                mode="lines+markers",
                marker_size=5,
                line_color=colour_of(row.column, content.columns),
                hovertemplate=row.server + ": %{y:" + form + "}<extra></extra>",
                row=line,
                col=1,
            )
        figure.update_yaxes(title=title, tickformat=form, rangemode="tozero", row=line, col=1)
    figure.update_xaxes(title="minutes since the start", row=len(shown), col=1)
    note = "A server may serve several columns."
    yield plot_of(figure, "memory", "Memory", note, FRAME_PX + 150 * len(shown))
