# SPDX-License-Identifier: Apache-2.0
"""Prompts are encoded as an engine gets them, message by message where that is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tokenizer

from kvcomm_vllm.estimate.encoder import Encoder
from kvcomm_vllm.estimate.flaws import EstimateError, Flaw, SkippedError
from kvcomm_vllm.estimate.pieces import Pieces
from kvcomm_vllm.estimate.record import Record, records

TEXTS = ["Be brief.", "  two blanks\n\nand lines\n", "Ünï çödé 🙂 <|im_end|> in it", "x", " "]


def record(line: dict[str, Any]) -> Record:
    (found,) = records(line)
    assert isinstance(found, Record)
    return found


def chat(*texts: str, **more: Any) -> Record:
    roles = ["system", *["user", "assistant"] * 9]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return record({"messages": messages, **more})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Encoder.load(str(folder))


@pytest.fixture(scope="module")
def smol(smollm2: str) -> Encoder:
    return Encoder.load(smollm2)


def test_a_chat_has_the_tokens_of_its_whole_text(smol: Encoder) -> None:
    for number in range(1, len(TEXTS) + 1):
        found = chat(*TEXTS[:number])
        messages = [{"role": m["role"], "content": "".join(m["content"])} for m in found.messages]
        whole = smol.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        wanted = smol.tokenizer.encode(whole, add_special_tokens=False)
        assert smol.prompt(found).tolist() == wanted
    assert smol.pieces.sound


def test_an_answer_is_what_the_next_turn_begins_with(smol: Encoder) -> None:
    said = {"role": "assistant", "content": "It is 7."}
    asked = chat("Be brief.", "What is it?", response={"choices": [{"message": said}]})
    prompt, answer = smol.prompt(asked).tolist(), smol.answer(asked).tolist()
    following = smol.prompt(chat("Be brief.", "What is it?", "It is 7.", "Sure?")).tolist()
    assert smol.text(smol.answer(asked)) == "It is 7.<|im_end|>"
    assert following[: len(prompt) + len(answer)] == prompt + answer


def test_a_tokenizer_that_is_not_sound_in_pieces_is_found_out(tiny: Encoder) -> None:
    pieces = Pieces(tiny.tokenizer)
    pieces.backend = Shifted(pieces.backend)
    for text in ("w7 <eos> w9", "w8 <eos>"):
        assert pieces.encode(text).tolist() == Shifted(tiny.pieces.backend).encode(text).ids
    assert not pieces.sound


class Shifted:
    """Puts a token before every text, as some tokenizers put a blank."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        self.ids = [2, *self.backend.encode(text, add_special_tokens=False).ids]
        return self


def test_a_template_over_parts_gets_parts(tiny: Encoder) -> None:
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c.text }} {% endfor %}{% endfor %}"
    )
    line = {"messages": [{"role": "user", "content": [{"type": "text", "text": "w7"}, "w8"]}]}
    assert Encoder(tiny.tokenizer, template).prompt(record(line)).tolist() == [7, 8]
    assert tiny.prompt(record(line)).tolist() == [7, 8]


def test_tools_reach_the_template(tiny: Encoder) -> None:
    template = "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "w9"}}]
    asked = chat("w7", tools=tools)
    assert Encoder(tiny.tokenizer, template).prompt(asked).tolist() == [9, 7]


def test_what_a_template_refuses_is_skipped(tiny: Encoder) -> None:
    for template in ("{{ raise_exception('no\nsystem') }}", "{{ 1 // 0 }}", "{% broken"):
        with pytest.raises(SkippedError) as error:
            Encoder(tiny.tokenizer, template).prompt(chat("w7"))
        assert error.value.flaw is Flaw.TEMPLATE
        assert "\n" not in error.value.detail


def test_no_tokenizer_is_an_error_of_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EstimateError, match="no tokenizer could be loaded") as error:
        Encoder.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_tokens_come_as_they_are_and_unknown_ones_can_be_shown(tiny: Encoder) -> None:
    found = tiny.prompt(record({"prompt": [7, 2**31 - 1]}))
    assert found.tolist() == [7, 2**31 - 1]
    assert isinstance(tiny.text(found), str)
