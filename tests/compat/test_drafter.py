# SPDX-License-Identifier: Apache-2.0
"""Drafters with layers are called as vLLM calls them behind a prefill, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomm_vllm.compat.drafter import Drafter, UnknownDrafterError, drafter_of

IDS = torch.tensor([3, 4, 9], dtype=torch.int32)
FOLLOWING = torch.tensor([4, 5, 8], dtype=torch.int32)
POSITIONS = torch.tensor([7, 8, 20])
HIDDEN = torch.arange(6.0).view(3, 2)
AUXILIARY = [HIDDEN + 10, HIDDEN + 20, HIDDEN + 30]


class Model:
    """Keeps what it is called with."""

    def __call__(self, **given: Any) -> None:
        self.given = given

    def combine_hidden_states(self, hidden: torch.Tensor) -> torch.Tensor:
        return -hidden

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return 10.0 * ids[:, None]


def proposer(kind: str, **attributes: Any) -> Any:
    names = {"layers.3.attn"}
    where = "draft_attn_layer_names" if kind.endswith("Speculator") else "_draft_attn_layer_names"
    made: Any = type(kind, (), {})()
    made.__dict__ |= {"model": Model(), where: names, **attributes}
    return made


def runner(method: str | None, found: Any, **more: Any) -> Any:
    speculative = SimpleNamespace(
        method=method, draft_model_config=SimpleNamespace(uses_mrope=True, mrope_num_dims=3)
    )
    config = SimpleNamespace(
        speculative_config=speculative if method else None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
    )
    where = "speculator" if type(found).__name__.endswith("Speculator") else "drafter"
    return SimpleNamespace(vllm_config=config, model=SimpleNamespace(), **{where: found}, **more)


def called(method: str, found: Any, output: Any = HIDDEN) -> dict[str, Any]:
    drafter = drafter_of(runner(method, found))
    assert isinstance(drafter, Drafter)
    drafter(output, IDS, FOLLOWING, POSITIONS)
    given: dict[str, Any] = drafter.model.given
    return given


@pytest.mark.parametrize("kind", ["DraftModelProposer", "StandaloneARSpeculator"])
def test_a_model_of_its_own_is_given_the_tokens_themselves(kind: str) -> None:
    given = called("draft_model", proposer(kind))
    assert given["input_ids"].tolist() == IDS.tolist()
    assert given["positions"].tolist() == POSITIONS.tolist()
    assert given["inputs_embeds"] is None
    assert "hidden_states" not in given


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("eagle", "EagleProposer"),
        ("mtp", "EagleProposer"),
        ("eagle", "EagleSpeculator"),
        ("mtp", "MTPSpeculator"),
    ],
)
def test_heads_are_given_the_next_tokens_beside_the_models_hidden_states(
    method: str, kind: str
) -> None:
    given = called(method, proposer(kind))
    assert given["input_ids"].tolist() == FOLLOWING.tolist()
    assert given["positions"].tolist() == POSITIONS.tolist()
    assert torch.equal(given["hidden_states"], HIDDEN)


@pytest.mark.parametrize("kind", ["EagleProposer", "EagleSpeculator"])
def test_eagle3_reads_the_layers_between_and_combines_them(kind: str) -> None:
    given = called("eagle3", proposer(kind), (HIDDEN, AUXILIARY))
    assert torch.equal(given["hidden_states"], -torch.cat(AUXILIARY, dim=-1))


def test_a_vocabulary_of_its_own_is_mapped_to() -> None:
    mapping = SimpleNamespace(map_target_to_draft_ids=lambda ids: ids + 100)
    found = proposer("DraftModelProposer", use_heterogeneous_vocab=True, vocab_mapping=mapping)
    assert called("draft_model", found)["input_ids"].tolist() == [103, 104, 109]


@pytest.mark.parametrize("kind", ["EagleProposer", "EagleSpeculator"])
def test_beside_models_that_see_images_text_is_embedded_as_vllm_does(kind: str) -> None:
    given = called("eagle", proposer(kind, supports_mm_inputs=True))
    assert given["inputs_embeds"].flatten().tolist() == [40.0, 50.0, 80.0]
    assert (given["input_ids"] is None) == (kind == "EagleProposer")


def test_rows_of_positions_are_those_of_the_drafter() -> None:
    given = called("eagle", proposer("EagleProposer", uses_mrope=True))
    assert given["positions"].tolist() == [POSITIONS.tolist()] * 3
    assert given["positions"].stride() == (16 + 1, 1)


@pytest.mark.parametrize("method", [None, "ngram", "suffix"])
def test_what_is_looked_up_in_the_text_has_no_layers(method: str | None) -> None:
    assert drafter_of(runner(method, proposer("NgramProposer"))) is None


def test_a_drafter_that_reads_the_models_own_kv_has_none_to_be_moved() -> None:
    found = proposer("EagleProposer", _draft_attn_layer_names=set())
    assert drafter_of(runner("mtp", found)) is None


@pytest.mark.parametrize(
    "found",
    [
        proposer("MultiModuleMTPSpeculator"),
        proposer("ProposerOfTomorrow"),
        proposer("EagleProposer", _draft_attn_layer_names=None),
        None,
    ],
    ids=["multi-module", "of tomorrow", "no names", "none"],
)
def test_others_are_refused_by_name(found: Any) -> None:
    with pytest.raises(UnknownDrafterError, match="tokens are guessed by"):
        drafter_of(runner("mtp", found))


def test_a_head_that_reads_something_else_than_the_models_output_is_refused() -> None:
    odd = runner("mtp", proposer("EagleProposer"))
    odd.model.get_mtp_target_hidden_states = lambda: None
    with pytest.raises(UnknownDrafterError):
        drafter_of(odd)
