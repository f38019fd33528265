# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: a bar per prompt and column, and what became of every prompt."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from kvcomm_vllm.evaluation.bench.columns import KVCOMM, NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.demo.scenes import Scene
from kvcomm_vllm.evaluation.demo.table import Traced
from kvcomm_vllm.evaluation.report.numbers import sooner

# Okabe-Ito colours, told apart with any kind of colour vision.
COLOURS = {"local": "#56B4E9", "reused": "#009E73", "computed": "#E69F00"}
# How a column is drawn: where its time stands in a row, its name, its colour.
BARS = {
    NO_CACHE: ("ttft_plain_ms", "plain vLLM, no cache", "#BBBBBB"),
    PLAIN: ("ttft_cached_ms", "plain vLLM, prefix caching", "#6E7B8B"),
    KVCOMM: ("ttft_kvcomm_ms", "kvcomm", "#009E73"),
}
BAR_HEIGHT = 0.26

Span = tuple[int, int, str]


def prompt_spans(call: Traced) -> list[Span]:
    """The prompt as consecutive (start, end, kind) spans in tokens, without gaps.

    Where the report leaves tokens out, they were computed: that is what vLLM does with all
    tokens nobody has provided.
    """
    raw: list[Any] = call.report.get("spans") or []
    total = call.prompt_tokens
    spans: list[Span] = []
    cursor = 0
    for start, end, kind in sorted((int(a), int(b), str(t)) for a, b, t in raw):
        if start > cursor:
            spans.append((cursor, start, "computed"))
        if end > cursor:
            spans.append((max(start, cursor), end, kind))
            cursor = end
    if cursor < total:
        spans.append((cursor, total, "computed"))
    return spans


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw_times(axes: Axes, scene: Scene, rows: list[Any]) -> None:
    bars = [bar for name, bar in BARS.items() if name in (*scene.columns, KVCOMM)]
    longest = max(max(getattr(row, key) for key, _, _ in bars) for row in rows)
    for number, (key, label, colour) in enumerate(bars):
        shift = (number - (len(bars) - 1) / 2) * BAR_HEIGHT
        heights = [row + shift for row in range(len(rows))]
        values = [getattr(row, key) for row in rows]
        axes.barh(heights, values, BAR_HEIGHT * 0.92, color=colour, label=label)
        for row, height, value in zip(rows, heights, values, strict=True):
            ours = key == "ttft_kvcomm_ms"
            text = f"{value:,.0f}" + (f"  ({sooner(row.speedup_cached)})" if ours else "")
            axes.text(
                value + longest * 0.012,
                height,
                text,
                va="center",
                fontsize=8,
                color="#00664B" if ours else "#444444",
                fontweight="bold" if ours else "normal",
            )
    axes.set_xlim(0, longest * 1.25)
    axes.set_xlabel("time to first token, ms (median; factor against prefix caching)")
    axes.set_title("Shorter is better", loc="left", fontsize=10, color="#444444")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=3, frameon=False, fontsize=8.5
    )


def _draw_prompts(axes: Axes, scene: Scene, traced: list[Traced]) -> None:
    labels = {
        "local": "own prefix, already cached",
        "reused": scene.reused,
        "computed": "computed",
    }
    seen: set[str] = set()
    for number, call in enumerate(traced):
        for start, end, kind in prompt_spans(call):
            colour = COLOURS.get(kind, "#999999")
            axes.barh(number, end - start, 0.62, left=start, color=colour)
            seen.add(kind)
    axes.set_xlim(0, max(call.prompt_tokens for call in traced) * 1.02)
    axes.set_xlabel("position in the prompt, tokens")
    axes.set_title(
        f"One more {scene.task}, prompt by prompt", loc="left", fontsize=10, color="#444444"
    )
    handles = [
        Patch(color=colour, label=labels[kind]) for kind, colour in COLOURS.items() if kind in seen
    ]
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.06),
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )


def write_figure(
    path: Path, scene: Scene, rows: list[Any], traced: list[Traced], where: str
) -> None:
    """Draw both panels to a PNG file; `traced` holds the same prompts in the same order, `where` is
    what they were served with.
    """
    figure, (times, prompts) = plt.subplots(1, 2, figsize=(13, 0.85 * len(rows) + 2.0), sharey=True)
    _draw_times(times, scene, rows)
    _draw_prompts(prompts, scene, traced)
    times.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=10, fontweight="bold")
    times.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (times, prompts):
        _plain_axes(axes)
    figure.suptitle(
        scene.picture.format(rows=len(rows)),
        x=0.008,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    figure.text(0.992, 0.005, where, ha="right", fontsize=7.5, color="#777777")
    figure.tight_layout(rect=(0, 0.02, 1, 0.97), w_pad=3)
    figure.savefig(path, dpi=160)
    plt.close(figure)
