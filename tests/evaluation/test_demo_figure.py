# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="the bench extra is not installed")


from kvcomm_vllm.evaluation.demo.edits import EditRow
from kvcomm_vllm.evaluation.demo.figure import prompt_spans, write_figure
from kvcomm_vllm.evaluation.demo.scenes import SCENES
from kvcomm_vllm.evaluation.demo.table import AgentRow, Traced

TREATMENTS = ("local", "reused", "computed")


def traced(total: int, spans: object) -> Traced:
    return Traced("Reader", total, {"spans": spans})


@given(
    st.integers(1, 200),
    st.lists(
        st.tuples(st.integers(0, 199), st.integers(1, 60), st.sampled_from(TREATMENTS)), max_size=8
    ),
)
def test_the_drawn_spans_cover_every_token_of_the_prompt_once(
    total: int, raw: list[tuple[int, int, str]]
) -> None:
    spans = [[start, min(start + n, total), kind] for start, n, kind in raw if start < total]
    drawn = prompt_spans(traced(total, spans))
    assert [(start, end) for start, end, _ in drawn] == list(
        zip([0, *(end for _, end, _ in drawn[:-1])], [end for _, end, _ in drawn], strict=True)
    )
    assert drawn[-1][1] == total


def test_a_complete_report_is_drawn_as_it_is_and_missing_parts_as_computed() -> None:
    report = [[0, 32, "local"], [32, 40, "computed"], [40, 90, "reused"]]
    assert prompt_spans(traced(100, report)) == [
        (0, 32, "local"),
        (32, 40, "computed"),
        (40, 90, "reused"),
        (90, 100, "computed"),
    ]
    assert prompt_spans(traced(100, None)) == [(0, 100, "computed")]


@pytest.mark.parametrize(
    ("scene", "row"),
    [
        ("agents", AgentRow("Reader", 100, 10, 60, 30, 900.0, 700.0, 70.0, 12.9, 10.0, 0.9, 1.0)),
        ("edit", EditRow("clock 1", 100, 80, 10, 700.0, 70.0, 1.0)),
    ],
)
def test_the_picture_is_a_wide_png_with_something_in_all_three_colours(
    scene: str, row: Any, tmp_path: Path
) -> None:
    import matplotlib.image

    file = tmp_path / "demo.png"
    report = [[0, 30, "local"], [30, 60, "reused"]]
    write_figure(file, SCENES[scene], [row, row], [traced(100, report)] * 2, "model, machine")
    pixels = matplotlib.image.imread(file)
    assert pixels.shape[1] > 1500
    colours = {tuple(c) for c in (pixels[::4, ::4, :3].reshape(-1, 3) * 255).round().astype(int)}
    for wanted in ((0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73), (0xE6, 0x9F, 0x00)):
        assert wanted in colours
