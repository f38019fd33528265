# SPDX-License-Identifier: Apache-2.0
"""The picture: mean KL over the number of anchors, a line per mode, a panel per workload."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kvcomm_vllm.evaluation.fidelity.report import Summary

# Okabe-Ito colours, told apart with any kind of colour vision.
COLOURS = ("#009E73", "#E69F00", "#56B4E9", "#D55E00", "#CC79A7", "#0072B2", "#000000")
SMALLEST = 1e-7  # what equals dense has no place on a logarithmic axis otherwise
PANEL_WIDTH, HEIGHT, PANELS_A_ROW = 5.4, 4.2, 3

Line = tuple[list[int], list[float]]


def lines(summaries: list[Summary]) -> dict[str, Line]:
    """(anchors, mean KL in nats) per mode, anchors ascending."""
    found: dict[str, list[tuple[int, float]]] = {}
    for summary in summaries:
        point = (summary.anchors, max(summary.kl_mean, SMALLEST))
        found.setdefault(summary.mode, []).append(point)
    return {
        mode: ([x for x, _ in sorted(line)], [y for _, y in sorted(line)])
        for mode, line in found.items()
    }


def _draw(axes: Axes, workload: str, summaries: list[Summary], colours: dict[str, str]) -> None:
    for mode, (anchors, kl) in lines(summaries).items():
        colour = colours[mode]
        if len(anchors) > 1:
            axes.plot(anchors, kl, marker="o", color=colour, label=mode)
        else:  # anchors make no difference: a level to compare with
            axes.axhline(kl[0], color=colour, linestyle="--", linewidth=1, alpha=0.7)
            axes.plot(anchors, kl, marker="s", color=colour, linestyle="--", label=mode)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    most = max(summary.anchors for summary in summaries)
    axes.set_xlim(-0.04 * max(most, 1), 1.04 * max(most, 1))
    axes.set_title(f"{workload}, {summaries[0].prompts} prompts", loc="left", fontsize=10)
    axes.set_xlabel("anchors")
    axes.grid(axis="y", which="both", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def write_figure(path: Path, summaries: list[Summary], note: str) -> None:
    """Draw all workloads to a PNG file; ``note`` says on what it was measured."""
    workloads = list(dict.fromkeys(summary.workload for summary in summaries))
    modes = dict.fromkeys(summary.mode for summary in summaries)
    colours = {mode: COLOURS[number % len(COLOURS)] for number, mode in enumerate(modes)}
    columns = min(len(workloads), PANELS_A_ROW)
    rows = -(-len(workloads) // columns)
    size = (PANEL_WIDTH * columns, HEIGHT * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(workloads):
            axes.set_axis_off()
            continue
        name = workloads[number]
        _draw(axes, name, [s for s in summaries if s.workload == name], colours)
        if number % columns == 0:
            axes.set_ylabel("mean KL to dense, nats (lower is better)")
    figure.text(0.992, 0.008, note, ha="right", fontsize=7.5, color="#777777")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=160)
    plt.close(figure)
