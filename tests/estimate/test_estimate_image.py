# SPDX-License-Identifier: Apache-2.0
"""The image of a prompt: every token has its colour, any text can be drawn, none is too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from kvcomm_vllm.estimate import image
from kvcomm_vllm.estimate.picture import Kind, Picture, Piece
from kvcomm_vllm.estimate.style import LIGHT

PIECES = [
    Piece(0, 100, Kind.LOCAL),
    Piece(100, 150, Kind.GAP),
    Piece(150, 400, Kind.REUSED),
    Piece(400, 500, Kind.COMPUTED),
]


def drawn(picture: Picture, path: Path) -> Image.Image:
    image.write_png(picture, path)
    return Image.open(path).convert("RGB")


def colour(kind: Kind) -> tuple[int, ...]:
    return ImageColor.getrgb(LIGHT[kind])


STRIP_TOP = image.MARGIN * 3 // 2 + image.LINE * (1 + len(PIECES))


def test_the_strip_gives_each_kind_the_share_of_its_tokens(tmp_path: Path) -> None:
    found = drawn(Picture("500 tokens", PIECES), tmp_path / "a.png")
    row = [found.getpixel((x, STRIP_TOP + image.STRIP // 2)) for x in range(found.width)]
    room = image.WIDTH - 2 * image.MARGIN
    for piece in PIECES:
        assert abs(row.count(colour(piece.kind)) - room * piece.tokens / 500) <= 3


def test_text_stands_on_the_colour_of_its_piece(tmp_path: Path) -> None:
    words = {0: "system", 100: "clock", 150: "said\nbefore " * 9, 400: "question"}
    text = Picture("500 tokens", PIECES, lambda start, end: words[start])
    found = drawn(text, tmp_path / "a.png")
    below = found.crop((0, STRIP_TOP + image.STRIP + 1, found.width, found.height))
    pixels = {pixel for _, pixel in below.getcolors(1 << 20) or []}
    assert {colour(piece.kind) for piece in PIECES} <= pixels


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_can_be_drawn(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("image") / "a.png"
    assert drawn(Picture("t", PIECES, lambda start, end: text), path).width == image.WIDTH


def test_a_long_prompt_ends_with_what_is_left_out(tmp_path: Path) -> None:
    pieces = [Piece(n, n + 1, Kind.REUSED) for n in range(2000)]
    found = drawn(Picture("t", pieces, lambda start, end: "line\n"), tmp_path / "a.png")
    assert found.height < (image.MOST_LINES + 12) * image.LINE + image.STRIP
    lines, left_out = image._Drawing(Picture("t", pieces, lambda a, b: "line\n"))._lines()
    assert left_out == 2000 - len(lines) + 1
