# SPDX-License-Identifier: Apache-2.0
"""What all plots have in common: the colours of columns, margins, legends."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from kvcomm_vllm.cli.bench.report.read import NO_CACHE, PLAIN

# Okabe-Ito colours, told apart with any kind of colour vision; greys for the baselines.
COLOURS = {
    NO_CACHE: "#B0B0B0",
    PLAIN: "#7F8C9B",
    "rotate": "#E69F00",
    "seam": "#56B4E9",
    "anchor": "#009E73",
    "paper": "#CC79A7",
}
OTHERS = ("#D55E00", "#0072B2", "#A6761D")
PLOT_PX = 380


@dataclass(frozen=True)
class Plot:
    """A figure as plotly.js reads it.

    Args:
        json: an object with ``data`` and ``layout``; colours of text and lines are the page's.
    """

    id: str
    title: str
    note: str
    json: str
    height: int


def colour_of(column: str, columns: list[str]) -> str:
    """The same colour for a column all over the page."""
    others = [name for name in columns if name not in COLOURS]
    return COLOURS.get(column) or OTHERS[others.index(column) % len(OTHERS)]


def plot_of(figure: go.Figure, name: str, title: str, note: str, height: int = PLOT_PX) -> Plot:
    """Finish a figure: margins, legend, no background, no zooming."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "t": 8, "b": 48, "r": figure.layout.margin.r or 16},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font_size": 13},
    )
    figure.update_xaxes(fixedrange=True, automargin=True)  # so that a finger scrolls the page
    figure.update_yaxes(fixedrange=True, automargin=True)
    return Plot(name, title, note, figure.to_json(), height)
