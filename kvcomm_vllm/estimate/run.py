# SPDX-License-Identifier: Apache-2.0
"""The run: every request of a log, in its order, through the server in thought."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.estimate.encoder import Encoder
from kvcomm_vllm.estimate.flaws import EstimateError, Flaw, SkippedError
from kvcomm_vllm.estimate.lines import entries
from kvcomm_vllm.estimate.losses import Loss, Part
from kvcomm_vllm.estimate.picture import KINDS, Kind, Picture, Piece
from kvcomm_vllm.estimate.record import Record, records
from kvcomm_vllm.estimate.renderings import rendering
from kvcomm_vllm.estimate.server import Prompt, RefusedError, Served, ServerInThought, TooLongError
from kvcomm_vllm.estimate.tally import Tally
from kvcomm_vllm.wording import one_line

ALL = "all"
LABEL = 40  # characters that name an agent without a name
MOST_PER_TOKEN = 16  # characters: text with more of them is not worth encoding
MOST_DRAWN = 1 << 15  # tokens
MOST_COMPARED = 10_000  # near copies of which is found out what was done to them


@dataclass(frozen=True)
class Options:
    """Args:
    served: the model whose requests count, ``all``, or nothing for that of the first one.
    salt: for requests that have no ``cache_salt``.
    line: whose prompt is drawn; None for the one of which most is reused.
    text: whether the picture shows what the prompt says.
    """

    config: KVCommConfig
    cache_tokens: int
    block_size: int
    served: str = ""
    salt: str | None = None
    line: int | None = None
    text: bool = True


class Run:
    """One estimate: ``tally`` and ``picture`` are what comes of it."""

    def __init__(self, options: Options, encoder: Encoder) -> None:
        self.options = options
        self.encoder = encoder
        self.server = ServerInThought(options.config, options.cache_tokens, options.block_size)
        self.tally = Tally()
        self.picture: Picture | None = None
        self.served = options.served
        self._drawn = -1
        self._compared = 0

    def read(
        self, log: Path, seen: Callable[[int, int], None] = lambda line, requests: None
    ) -> None:
        """All of a log; ``seen`` hears of each line.

        Raises:
            EstimateError: it cannot be read, or there is no request in it.
        """
        line = 0
        for line, entry in entries(log):
            for record in [entry] if isinstance(entry, SkippedError) else records(entry):
                self.take(record, line)
            seen(line, self.tally.total.requests)
        if not self.tally.total.requests:
            raise EstimateError(f"{one_line(str(log))}: {self._nothing(line)}")

    def take(self, record: Record | SkippedError, line: int) -> None:
        """One request: it is served, or counted as skipped."""
        try:
            if isinstance(record, SkippedError):
                raise record
            self._serve(record, line)
        except SkippedError as skipped:
            self.tally.flaws.add(skipped, line)

    def _nothing(self, lines: int) -> str:
        if not lines:
            return "empty"
        flaw, count = max(self.tally.flaws.counts.items(), key=lambda item: item[1].number)
        more = f" ({count.detail})" if count.detail else ""
        return (
            f"no request in {lines:,} lines could be used; line {count.first_line}: "
            f"{flaw.explanation}{more}"
        )

    def _serve(self, record: Record, line: int) -> None:
        self.served = self.served or record.model
        if self.served not in (ALL, record.model) and record.model:
            raise SkippedError(Flaw.OTHER_MODEL, one_line(record.model, 60))
        if record.characters > MOST_PER_TOKEN * self.server.capacity:
            raise SkippedError(Flaw.LONG_PROMPT, f"{record.characters:,} characters")
        tokens = self.encoder.prompt(record)
        if not len(tokens):
            raise SkippedError(Flaw.EMPTY)
        answer = self.encoder.answer(record)
        salt = record.salt or self.options.salt
        prompt = Prompt(tokens, answer, salt, record.hints, record.scored)
        try:
            served = self.server.serve(prompt)
        except RefusedError as error:
            raise SkippedError(Flaw.REFUSED, one_line(str(error), 100)) from None
        except TooLongError:
            told = f"{len(tokens):,} tokens, with {len(answer):,} of its answer"
            raise SkippedError(Flaw.LONG_PROMPT, told) from None
        served = replace(served, losses=[self._named(prompt, loss) for loss in served.losses])
        self.tally.add(record.agent or _label(record), served, line)
        self.tally.unsalted += salt is None
        self.tally.answers += len(answer) > 0
        self._draw(prompt, served, line)

    def _named(self, prompt: Prompt, loss: Loss) -> Loss:
        """A near copy is re-encoded where it is known what was done to it."""
        if loss.copy is None:
            return loss
        found = None
        if self._compared < MOST_COMPARED:
            self._compared += 1
            text = self.encoder.text(prompt.tokens[loss.start : loss.end])
            found = rendering(text, self.encoder.text(loss.copy.original))
        return replace(loss, why=Part.RE_ENCODED if found else Part.SIMILAR, rendering=found)

    def _draw(self, prompt: Prompt, served: Served, line: int) -> None:
        """Keep this prompt as the picture, if it is the wanted one."""
        if self.options.line is None:
            wanted = served.reused > self._drawn and len(prompt.tokens) <= MOST_DRAWN
        else:
            wanted = line == self.options.line
        if not wanted:
            return
        self._drawn = served.reused
        last = max((end for _, end, kind in served.spans if kind == Kind.REUSED), default=0)
        hits = [(*span, "") for span in served.spans if span[2] != Kind.COMPUTED]
        rows = hits + [
            (loss.start, loss.end, _kind(loss, last), loss.name) for loss in served.losses
        ]
        pieces = [Piece(start, end, KINDS[kind], note) for start, end, kind, note in sorted(rows)]

        def text(start: int, end: int) -> str:
            return self.encoder.text(prompt.tokens[start:end])

        title = f"The prompt of line {line}: {len(prompt.tokens):,} tokens"
        self.picture = Picture(title, pieces, text if self.options.text else None)


def _kind(loss: Loss, last: int) -> Kind:
    if loss.why == Part.SEAM:
        return Kind.SEAM
    if loss.why == Part.RE_ENCODED:
        return Kind.COPY
    return Kind.GAP if loss.start < last else Kind.COMPUTED


def _label(record: Record) -> str:
    """An agent without a name is known by how its prompts begin, as it is to the product."""
    if record.messages:
        begin = next((text for m in record.messages for text in m["content"]), "")
    else:
        begin = record.prompt if isinstance(record.prompt, str) else "(token ids)"
    begin = " ".join(begin[: 4 * LABEL].split())
    return one_line(begin[:LABEL] + ("…" if len(begin) > LABEL else "")) if begin else "(no text)"
