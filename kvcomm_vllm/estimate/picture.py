# SPDX-License-Identifier: Apache-2.0
"""The picture of one prompt: its text coloured by treatment. Of an estimate, or of a report."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from kvcomm_vllm.wording import Explained

MOST_BYTES = 150_000  # of the text
MOST_CHARACTERS = 1500  # of one part; of a longer one the middle is left out
MOST_TOLD = 500  # of more pieces the strip says nothing but their colours
LITTLE = 450  # the same where nothing is to be seen: in the prefix
Text = Callable[[int, int], str]


class Kind(Explained):
    """How a part of a prompt got its KV; the explanations are the legend."""

    LOCAL = ("local", "vLLM's own prefix cache")
    REUSED = ("reused", "reused from other requests")
    SEAM = ("seam", "seam: first tokens of reused text, computed")
    GAP = ("gap", "computed, before reused text")
    COPY = ("copy", "computed, though shared: it is stored in another rendering")
    COMPUTED = ("computed", "computed, behind all reused text")


KINDS: dict[str, Kind] = {kind.value: kind for kind in Kind}


@dataclass(frozen=True)
class Piece:
    """``start..end`` of the prompt; ``note`` says more than its kind does."""

    start: int
    end: int
    kind: Kind
    note: str = ""

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Picture:
    """``text(start, end)`` is what tokens say; None leaves the text out."""

    title: str
    pieces: Listing[Piece]
    text: Text | None = None

    def markup(self) -> str:
        """HTML of a figure; its colours are those of :mod:`kvcomm_vllm.estimate.style`."""
        used = [kind for kind in Kind if any(piece.kind is kind for piece in self.pieces)]
        legend = "".join(
            f'<li><i class="{kind}"></i>{html.escape(kind.explanation)}</li>' for kind in used
        )
        told = len(self.pieces) <= MOST_TOLD
        strip = "".join(
            f'<b class="{piece.kind}" style="flex:{piece.tokens}"'
            + (f' title="{_note(piece)}"></b>' if told else "></b>")
            for piece in self.pieces
        )
        return (
            f'<figure><figcaption>{html.escape(self.title)}</figcaption><ul class="legend">{legend}'
            f'</ul><div class="strip">{strip}</div>{self._text()}</figure>'
        )

    def _text(self) -> str:
        if self.text is None:
            return ""
        written, room = [], MOST_BYTES
        for piece in self.pieces:
            said = html.escape(shortened(piece, self.text(piece.start, piece.end)))
            part = f'<span class="{piece.kind}" title="{_note(piece)}">{said}</span>'
            room -= len(part.encode("utf-8", "replace"))
            if room < 0:
                written.append(f"<em>… {self.pieces[-1].end - piece.start:,} more tokens</em>")
                break
            written.append(part)
        return f"<pre>{''.join(written)}</pre>"


def of_report(spans: Iterable[Listing[object]], near: Iterable[Listing[object]]) -> list[Piece]:
    """Pieces of a request's report: its ``spans``, with what of the computed ones is ``near``."""
    rows = [(int(str(start)), int(str(end)), str(kind)) for start, end, kind in spans]
    last = max((end for _, end, kind in rows if kind == Kind.REUSED), default=0)
    copies = sorted((int(str(row[0])), int(str(row[1]))) for row in near)
    pieces = []
    for start, end, kind in rows:
        if kind != Kind.COMPUTED:
            pieces.append(Piece(start, end, KINDS[kind]))
            continue
        plain = Kind.GAP if start < last else Kind.COMPUTED
        for copy_start, copy_end in copies:
            inner, outer = max(start, copy_start), min(end, copy_end)
            if inner < outer:
                pieces += [Piece(start, inner, plain), Piece(inner, outer, Kind.COPY)]
                start = outer
        pieces.append(Piece(start, end, plain))
    return [piece for piece in pieces if piece.tokens]


def _note(piece: Piece) -> str:
    return html.escape(f"{piece.note or piece.kind.explanation}: {piece.tokens:,} tokens")


def shortened(piece: Piece, text: str) -> str:
    """What is shown of a piece's text: of much of it the middle is left out."""
    most = LITTLE if piece.kind is Kind.LOCAL else MOST_CHARACTERS
    if len(text) <= most:
        return text
    left_out = f"[… of {piece.tokens:,} tokens, shortened …]"
    return f"{text[: most * 2 // 3]}\n{left_out}\n{text[-most // 3 :]}"
