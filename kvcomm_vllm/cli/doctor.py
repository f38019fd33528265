# SPDX-License-Identifier: Apache-2.0
"""`kvcomm doctor`: one line for each thing that must be right, and what to do if it is not."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from kvcomm_vllm.cli import checks
from kvcomm_vllm.cli.tier_checks import tier_probes


class Status(Enum):
    """Result of a check; only FAIL keeps the plugin from working."""

    OK = "ok"
    NOTE = "note"
    FAIL = "fail"


STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.FAIL: "bold red"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    detail: str


def _judge(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name, Status.OK, probe())
    except checks.AdviceError as advice:
        return Check(name, Status.NOTE, str(advice))
    except (checks.ProblemError, ImportError) as problem:
        return Check(name, Status.FAIL, str(problem))


def run_checks(
    config: Path | None = None, model: str | None = None, server: str | None = None
) -> list[Check]:
    """Check the environment, and a config file, a model folder, or a server if given."""
    probes: list[tuple[str, Callable[[], str]]] = [
        ("Python", checks.python),
        ("hardware", checks.hardware),
        ("torch", checks.torch),
        ("torchvision", checks.torchvision),
        ("vLLM", checks.vllm),
        ("vllm command", checks.vllm_command),
        ("plugin", checks.plugin),
        ("kernels", checks.kernels),
        ("allocator", checks.allocator),
        ("connectors", checks.connectors),
        ("demo packages", checks.measuring_packages),
    ]
    if config is not None:
        probes.append(("config file", lambda: checks.config_file(config)))
        probes += tier_probes(config)
    if model is not None:
        probes.append(("model", lambda: checks.model(model)))
    if server is not None:
        probes.append(("server", lambda: checks.server(server)))
    return [_judge(name, probe) for name, probe in probes]


def render_checks(results: list[Check]) -> Table:
    """The table that the doctor prints."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("status", no_wrap=True)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in results:
        style = STYLES[check.status]
        table.add_row(f"[{style}]{check.status.value}[/]", check.name, escape(check.detail))
    return table
