# SPDX-License-Identifier: Apache-2.0
"""What a step of the worker half asks of the device: launches, copies, waits; and their picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

# How CUDA's calls are called in torch's profiler.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
MOST_BARS = 4000


def profiled(run: Callable[[], object], trace: Path | None = None) -> dict[str, int]:
    """Calls by kind while ``run`` ran; ``trace``: where Chrome's trace of it goes."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as seen:
        run()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    counts = {event.key: event.count for event in seen.key_averages()}
    kinds = {"launches": LAUNCHES, "copies": COPIES, "waits": WAITS}
    return {kind: sum(counts.get(name, 0) for name in names) for kind, names in kinds.items()}


def draw(trace: dict[str, Any], path: Path, title: str) -> None:
    """Kernels and copies on the device over time, from Chrome's trace; of a CPU its operations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    device = [event for event in events if str(event.get("cat")).startswith(("kernel", "gpu_"))]
    shown = (device or [event for event in events if event.get("cat") == "cpu_op"])[:MOST_BARS]
    begin = min((float(event["ts"]) for event in shown), default=0.0)
    groups = {"ours": "#009E73", "copy": "#E69F00", "model": "#6E7B8B"}
    figure, axes = plt.subplots(figsize=(11, 2.6))
    for row, (name, colour) in enumerate(groups.items()):
        bars = [
            ((float(event["ts"]) - begin) / 1e3, max(float(event["dur"]), 1.0) / 1e3)
            for event in shown
            if _group(str(event["name"])) == name
        ]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _group(name: str) -> str:
    if name.startswith(("load", "collect", "distance")):
        return "ours"
    return "copy" if "memcpy" in name.lower() or "copy_" in name else "model"
