# SPDX-License-Identifier: Apache-2.0
"""The picture of one prompt as PNG, for where a page cannot go: a thread, a report, a chat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kvcomm_vllm.estimate.picture import Kind, Picture, shortened
from kvcomm_vllm.estimate.style import LIGHT

WIDTH, MARGIN = 1000, 24  # pixels
SIZE, LINE = 14, 20  # of the letters, and of a line of them
STRIP = 28
MOST_LINES = 300  # of the text
_WORDS = re.compile(r"\n|[^\s]+[^\S\n]*|[^\S\n]+")
Run = tuple[float, str, Kind]  # where it starts in its line, what it says


def write_png(picture: Picture, path: Path) -> None:
    """Draw the title, the legend, the prompt as a strip, and its text coloured by treatment.

    Raises:
        OSError: the file cannot be written.
    """
    _Drawing(picture).image().save(path, format="PNG")


class _Drawing:
    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.font = ImageFont.load_default(SIZE)
        self.room = WIDTH - 2 * MARGIN

    def image(self) -> Image.Image:
        kinds = [kind for kind in Kind if any(piece.kind is kind for piece in self.picture.pieces)]
        lines, left_out = self._lines()
        height = 3 * MARGIN + LINE * (1 + len(kinds) + len(lines) + bool(left_out)) + STRIP
        image = Image.new("RGB", (WIDTH, height), LIGHT["back"])
        self.draw = ImageDraw.Draw(image)
        self._write(MARGIN, MARGIN, self.picture.title)
        y = MARGIN + LINE
        for kind in kinds:
            self.draw.rectangle((MARGIN, y + 3, MARGIN + 12, y + 15), LIGHT[kind], LIGHT["line"])
            self._write(MARGIN + 20, y, kind.explanation)
            y += LINE
        self._strip(y + MARGIN // 2)
        y += MARGIN + STRIP
        for line in lines:
            for x, text, kind in line:
                self._write(MARGIN + x, y, text, kind)
            y += LINE
        if left_out:
            self._write(MARGIN, y, f"… {left_out:,} more tokens")
        return image

    def _write(self, x: float, y: float, text: str, kind: Kind | None = None) -> None:
        if kind is not None:
            box = (x, y, x + self.font.getlength(text), y + LINE - 1)
            self.draw.rectangle(box, LIGHT[kind])
        self.draw.text((x, y + 1), text, LIGHT["ink"], self.font)

    def _strip(self, y: int) -> None:
        pieces = self.picture.pieces
        total = max(1, pieces[-1].end if pieces else 1)
        for piece in pieces:
            start, end = (MARGIN + self.room * at / total for at in (piece.start, piece.end))
            self.draw.rectangle((start, y, max(start, end - 1), y + STRIP), LIGHT[piece.kind])
        self.draw.rectangle((MARGIN, y, WIDTH - MARGIN, y + STRIP), outline=LIGHT["line"])

    def _lines(self) -> tuple[list[list[Run]], int]:
        """Lines of text, and the tokens of the pieces that have no room."""
        lines: list[list[Run]] = [[]]
        x = 0.0
        for piece in self.picture.pieces if self.picture.text is not None else ():
            if len(lines) >= MOST_LINES:
                return lines, self.picture.pieces[-1].end - piece.start
            assert self.picture.text is not None
            said = shortened(piece, self.picture.text(piece.start, piece.end))
            for word in self._words(said):
                width = self.font.getlength(word)
                if word == "\n" or x + width > self.room:
                    lines.append([])
                    x = 0.0
                if word != "\n":
                    lines[-1].append((x, word, piece.kind))
                    x += width
        return lines, 0

    def _words(self, text: str) -> Iterator[str]:
        """Words with the blanks behind them and line ends; what is longer than a line in parts."""
        for word in _WORDS.findall(text.replace("\t", "    ")):
            fits = max(1, int(len(word) * self.room / max(1.0, self.font.getlength(word))))
            if word == "\n" or fits >= len(word):
                yield word
            else:
                step = max(1, fits - 4)  # letters differ in width
                yield from (word[at : at + step] for at in range(0, len(word), step))
