# SPDX-License-Identifier: Apache-2.0
"""The side forward calls a model the way vLLM's runners do, so that its compiled code serves."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomm_vllm.compat.model import UnknownPositionsError
from kvcomm_vllm.messages import HoleOp
from kvcomm_vllm.worker import side_forward
from kvcomm_vllm.worker.side_forward import Row, SideForward


class Model:
    """Keeps what it is called with; embeddings are ten times the token."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__ |= attributes

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 10.0 * input_ids[:, None]

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.inputs = inputs
        return inputs["positions"].reshape(-1, 1).float()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a model is called with for tokens 3, 4 at positions 5, 6, and whether eagerly."""

    def call(
        model: Model, *, multimodal: bool, prompts: bool = False, **more: Any
    ) -> tuple[Any, bool]:
        modes: list[bool] = []
        monkeypatch.setattr(side_forward, "metadata_builders", lambda _: [])
        monkeypatch.setattr(
            "kvcomm_vllm.worker.side_forward.forward_context",
            lambda *given: modes.append(given[-1]) or nullcontext(),
        )
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
            model_config=SimpleNamespace(
                enable_prompt_embeds=prompts, supports_multimodal_inputs=multimodal, **more
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        runner = SimpleNamespace(
            model=model, vllm_config=config, device=torch.device("cpu"), attn_groups=[]
        )
        SideForward(runner, 16).run([Row([1], HoleOp(5, [3, 4]))])
        return model.inputs, modes[0]

    return call


def test_models_of_token_ids_are_given_token_ids(called: Any) -> None:
    inputs, eager = called(Model(), multimodal=False)
    assert inputs["input_ids"].tolist() == [3, 4]
    assert inputs["positions"].tolist() == [5, 6]
    assert "inputs_embeds" not in inputs
    assert not eager


@pytest.mark.parametrize(("multimodal", "prompts"), [(True, False), (False, True)])
def test_models_compiled_for_embeddings_are_given_embeddings_alone_and_are_not_eager(
    called: Any, multimodal: bool, prompts: bool
) -> None:
    inputs, eager = called(Model(), multimodal=multimodal, prompts=prompts)
    assert inputs["input_ids"] is None
    assert inputs["inputs_embeds"].flatten().tolist() == [30.0, 40.0]
    assert not eager


def test_models_that_ask_for_both_are_given_both(called: Any) -> None:
    inputs, _ = called(Model(requires_raw_input_tokens=True), multimodal=True)
    assert inputs["input_ids"].tolist() == [3, 4]
    assert inputs["inputs_embeds"] is not None


@pytest.mark.parametrize(
    "kept",
    [
        {"per_layer_embeddings": torch.zeros(1)},
        {"deepstack_input_embeds": None},
        {"visual_token_mask": None},
        {"_set_visual_token_mask": print},
        {"_ds_buffers": []},
    ],
    ids=lambda kept: next(iter(kept)),
)
def test_what_a_model_has_kept_of_the_steps_own_embedding_is_not_overwritten(
    called: Any, kept: dict[str, Any]
) -> None:
    inputs, eager = called(Model(**kept), multimodal=True)
    assert inputs["input_ids"].tolist() == [3, 4]
    assert "inputs_embeds" not in inputs
    assert eager


def test_a_model_without_embeddings_per_layer_keeps_none(called: Any) -> None:
    inputs, eager = called(Model(per_layer_embeddings=None), multimodal=True)
    assert inputs["input_ids"] is None
    assert not eager


@pytest.mark.parametrize(("more", "rows"), [({}, 3), ({"mrope_num_dims": 4}, 4)])
def test_models_with_m_rope_are_given_a_row_of_positions_for_each_part_as_vllm_gives_them(
    called: Any, more: dict[str, Any], rows: int
) -> None:
    inputs, _ = called(Model(), multimodal=True, uses_mrope=True, **more)
    assert inputs["positions"].tolist() == [[5, 6]] * rows
    # of the runners' buffers: the longest step and one; compiled code relies on it
    assert inputs["positions"].stride() == (64 + 1, 1)


def test_models_with_xd_rope_are_refused_by_name(called: Any) -> None:
    with pytest.raises(UnknownPositionsError, match="XDRotaryEmbedding"):
        called(Model(), multimodal=True, uses_xdrope_dim=4)
