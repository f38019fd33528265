# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: drawn, without errors, readable on a phone and at night."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_up_run import AGENTS, COLUMNS, write_run

pytest.importorskip("openai", reason="the bench extra is not installed")
pytest.importorskip("jinja2", reason="the bench extra is not installed")
pytest.importorskip("plotly", reason="the bench extra is not installed")

from kvcomm_vllm.cli.bench.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_SECONDS = 240
PHONE_PX = 390
# A bar, a point, or a line; axes and grids are paths of other classes.
DRAWN = r'<(?:g class="point"><path|path class="point"|path class="js-line")[^>]* d="M'
# A frame of a phone's width; what is asked of the page in it ends up in the document.
FRAME = """<!doctype html>
<iframe id="frame" src="report.html" style="width:{width}px; height:800px; border:0;
  color-scheme:{scheme}"></iframe>
<output id="found"></output>
<script>
frame.onload = () => setTimeout(() => {{
  const inside = frame.contentDocument;
  const plots = [...inside.querySelectorAll(".plot .main-svg")];
  found.textContent = JSON.stringify({{
    page: inside.documentElement.scrollWidth,
    visible: inside.documentElement.clientWidth,
    plot: Math.max(...plots.map((plot) => plot.getBoundingClientRect().right)),
    back: frame.contentWindow.getComputedStyle(inside.body).backgroundColor,
    text: frame.contentWindow.getComputedStyle(inside.querySelector(".xtick text")).fill,
  }});
}}, 500);
</script>
"""


@dataclass(frozen=True)
class Shown:
    """The document as the browser has it in the end, and what it wrote to its console."""

    document: str
    console: list[str]


@pytest.fixture(scope="module")
def browser() -> str:
    """A Chromium, or skip."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on the path: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a run that was made up."""
    folder = write_run(tmp_path_factory.mktemp("run"), stream=30)
    write_report(folder)
    return folder


def show(browser: str, path: Path) -> Shown:
    """Open a file, wait until all its scripts have ended."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1280,900"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={path.parent / 'profile'}"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line])


@pytest.fixture(scope="module")
def shown(browser: str, folder: Path) -> Shown:
    return show(browser, folder / "report.html")


def test_no_script_of_the_page_fails(shown: Shown) -> None:
    assert shown.console == []


def test_a_script_that_fails_would_be_seen(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>throw new Error('made up')</script>")
    (line,) = show(browser, page).console
    assert "made up" in line


def figures(shown: Shown) -> dict[str, str]:
    found = re.findall(r'<figure id="plot-(.*?)">(.*?)</figure>', shown.document, re.DOTALL)
    return dict(found)


def test_every_plot_is_drawn(shown: Shown) -> None:
    found = figures(shown)
    agents = {f"agents-{workload}" for workload in ("math", "synthetic", "judge")}
    assert set(found) == agents | {"saving", "quality", "decay", "memory"}
    for name, figure in found.items():
        assert re.search(DRAWN, figure), name


@pytest.mark.parametrize(
    ("plot", "marks"),
    [
        ("agents-math", len(AGENTS) * len(COLUMNS)),
        ("saving", len(AGENTS) * 2 * 3),  # two columns beside the baselines, three workloads
        ("quality", len(COLUMNS) - 1),
        ("decay", 29 + 3 + 1),  # tasks after warm-up, lines of windows, one of them in the legend
        ("memory", 5 * (39 + 1) + 2),  # looks, the line through them, and two in the legend
    ],
)
def test_a_plot_has_a_mark_for_each_of_its_numbers(shown: Shown, plot: str, marks: int) -> None:
    assert len(re.findall(DRAWN, figures(shown)[plot])) == marks


def rows(shown: Shown, table: str) -> list[list[str]]:
    (found,) = re.findall(
        rf'<section [^>]*id="table-{table}">(.*?)</section>', shown.document, re.S
    )
    body = found.split("<tbody>")[1]
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)]
        for row in body.split("</tr>")
        if "<td" in row
    ]


def test_the_numbers_of_the_json_stand_on_the_page(shown: Shown, folder: Path) -> None:
    numbers: dict[str, Any] = json.loads((folder / "report.json").read_text())
    found = {tuple(row[:2]): row for row in rows(shown, "ttft")}
    assert len(found) == len(numbers["latency"]) == len(COLUMNS) * 4
    for entry in numbers["latency"]:
        row = found[entry["workload"], entry["column"]]
        every = entry["every"]
        for number in (every["p50"], every["p90"], every["p99"]):
            assert f"{number:,.0f}" in row
        assert f"{every['total_s']:,.2f}" in row
        if "plain" in every["ratios"]:
            assert row[2].startswith(f"{every['ratios']['plain']['value']:.2f}×")
    scores = {tuple(row[:2]): row for row in rows(shown, "quality")}
    for entry in numbers["quality"]:
        if entry["score"] is not None:
            assert f"{entry['score']:.1%}" in scores[entry["workload"], entry["column"]]


def in_frame(browser: str, folder: Path, width: int, scheme: str) -> dict[str, Any]:
    page = folder / f"frame-{width}-{scheme}.html"
    page.write_text(FRAME.format(width=width, scheme=scheme))
    (found,) = re.findall(r'<output id="found">(.*?)</output>', show(browser, page).document)
    report: dict[str, Any] = json.loads(found)
    return report


def test_a_phone_need_not_scroll_sideways(browser: str, folder: Path) -> None:
    found = in_frame(browser, folder, PHONE_PX, "light")
    assert found["page"] == found["visible"] <= PHONE_PX
    assert PHONE_PX / 2 < found["plot"] <= found["visible"]


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_text_and_plots_follow_the_readers_colour_scheme(
    browser: str, folder: Path, scheme: str, dark: bool
) -> None:
    found = in_frame(browser, folder, 1200, scheme)
    assert (brightness(found["back"]) < 0.3) == dark
    assert (brightness(found["text"]) > 0.7) == dark
