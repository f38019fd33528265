# SPDX-License-Identifier: Apache-2.0
"""Token ids of an agent's prompt, with any tokenizer."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError


def chat_prompt(tokenizer: Any, system: str, user: str) -> list[int]:
    """The prompt as the model's chat template has it, plain text where there is none.

    Args:
        tokenizer: of the transformers library.
        system: instructions; empty = none. Templates without a place for them get them in front
            of the user's text.
    """
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{user}\n\n".lstrip()
        return list(tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": user}]
    if system:
        try:
            return _templated(tokenizer, [{"role": "system", "content": system}, *chat])
        except TemplateError:
            chat = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return _templated(tokenizer, chat)


def _templated(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
