# SPDX-License-Identifier: Apache-2.0
"""The encoder: prompts of a log as the tokens an engine would get, by the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvcomm_vllm.estimate.flaws import EstimateError, Flaw, SkippedError
from kvcomm_vllm.estimate.messages import Message
from kvcomm_vllm.estimate.pieces import Pieces
from kvcomm_vllm.estimate.record import Record
from kvcomm_vllm.scheduler.index import I32
from kvcomm_vllm.wording import one_line

NOTHING = np.zeros(0, np.int32)


class Encoder:
    """Args:
    tokenizer: one of transformers.
    template: a chat template, instead of its own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or getattr(tokenizer, "chat_template", None)
        self.in_parts = _loops_over_parts(self.template)
        self.pieces = Pieces(tokenizer)

    @classmethod
    def load(cls, name: str, template: Path | None = None) -> Encoder:
        """The tokenizer of a folder or Hugging Face id.

        Raises:
            EstimateError: there is none, or no such template.
        """
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()
        try:
            text = template.read_text(encoding="utf-8") if template else None
            return cls(AutoTokenizer.from_pretrained(name), text)
        except Exception as error:  # of many kinds, and other people's
            said = one_line(" ".join(str(error).split()), 160)
            raise EstimateError(f"{name}: no tokenizer could be loaded: {said}") from None

    def prompt(self, record: Record) -> I32:
        """Token ids of a record's prompt.

        Raises:
            SkippedError: the template or the tokenizer cannot make any.
        """
        if isinstance(record.prompt, list):
            return np.array(record.prompt, np.int32)
        try:
            if record.messages is None:
                return self.pieces.whole(record.prompt, special=True)
            return self.pieces.encode(self._chat(record, record.messages, True))
        except Exception as error:  # a template is a program of its author's
            raise SkippedError(Flaw.TEMPLATE, _told(error)) from None

    def answer(self, record: Record) -> I32:
        """Token ids of what was generated, as far as it is known: what the template puts behind the
        prompt for it, up to the end of the turn.
        """
        try:
            if isinstance(record.answer, str):
                return self.pieces.encode(record.answer)
            if record.answer is None or record.messages is None:
                return NOTHING
            prompt = self._chat(record, record.messages, True)
            turn = self._chat(record, [*record.messages, record.answer], False)
            end = str(self.tokenizer.eos_token or "")
            said = "".join(record.answer["content"]) + end
            if turn.startswith(prompt):
                said = turn[len(prompt) :]
                said = said[: said.rfind(end) + len(end)] if end and end in said else said
            return self.pieces.encode(said)
        except Exception:  # an answer that cannot be written as one is as good as not logged
            return NOTHING

    def text(self, tokens: I32) -> str:
        """What tokens say; characters that are cut apart are replaced."""
        try:
            return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))
        except Exception:  # a log may have token ids that the vocabulary has not
            return f"[{len(tokens):,} tokens that the tokenizer does not know]"

    def _chat(self, record: Record, messages: list[Message], ask: bool) -> str:
        if self.template is None:
            raise ValueError("the tokenizer has no chat template (see --chat-template)")
        return str(
            self.tokenizer.apply_chat_template(
                [self._written(message) for message in messages],
                tools=record.tools,
                chat_template=self.template,
                add_generation_prompt=ask,
                tokenize=False,
                **(record.template or {}),
            )
        )

    def _written(self, message: Message) -> Message:
        """As vLLM writes content: in parts for templates that go over them, else as one text."""
        texts = message["content"]
        parts = [{"type": "text", "text": text} for text in texts]
        return message | {"content": parts if self.in_parts else "\n".join(texts)}


def _loops_over_parts(template: object) -> bool:
    if not isinstance(template, str):
        return False
    import jinja2

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:  # it has statements of transformers' own
        return False
    for loop in tree.find_all(jinja2.nodes.For):
        over = loop.iter
        if isinstance(over, jinja2.nodes.Getitem) and isinstance(over.arg, jinja2.nodes.Const):
            if over.arg.value == "content":
                return True
        elif getattr(over, "attr", getattr(over, "name", None)) == "content":
            return True
    return False


def _told(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 100)
