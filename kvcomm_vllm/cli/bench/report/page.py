# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from kvcomm_vllm.cli.bench.report.content import Content
from kvcomm_vllm.cli.bench.report.definitions import definitions
from kvcomm_vllm.cli.bench.report.facts import command_of, facts, other_settings
from kvcomm_vllm.cli.bench.report.plot import colour_of
from kvcomm_vllm.cli.bench.report.plots import all_plots
from kvcomm_vllm.cli.bench.report.read import Run
from kvcomm_vllm.cli.bench.report.tables import all_tables
from kvcomm_vllm.cli.bench.report.words import alarms, cards, unknown

ASSETS = Path(__file__).parent / "assets"


def page(content: Content, run: Run) -> str:
    """The text of report.html."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = all_plots(content, run)
    return environment.get_template("page.html").render(
        alarms=alarms(content),
        cards=cards(content),
        command=command_of(run),
        facts=facts(content, run),
        settings=other_settings(run),
        plots=plots,
        # A figure's text may hold anything but the end of the script element it stands in.
        figures={plot.id: plot.json.replace("<", "\\u003c") for plot in plots},
        tables=all_tables(content),
        colours={column: colour_of(column, content.columns) for column in content.columns},
        definitions=definitions(content),
        unknown=unknown(content, run),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )
