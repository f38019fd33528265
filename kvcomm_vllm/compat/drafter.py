# SPDX-License-Identifier: Apache-2.0
"""What guesses tokens ahead with attention layers of its own (EAGLE, MTP, a small model), as vLLM's
model runners keep and call it (V1 and V2).

Its layers' KV lies in the pages of the model's own. vLLM takes from it what to try, never what is
answered: KV that is wrong there lowers how many guesses are right, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.model import model_positions, position_rows

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

LAYERED = ("draft_model", "eagle", "eagle3", "mtp")  # methods
_OF_THE_TARGET = ("eagle", "eagle3", "mtp")  # read its hidden states, one token behind
_PROPOSERS = {"DraftModelProposer", "EagleProposer"}
_SPECULATORS = {"EagleSpeculator", "MTPSpeculator", "StandaloneARSpeculator"}


class UnknownDrafterError(RuntimeError):
    """How tokens are guessed ahead is not known; the message says what was seen."""


class Drafter:
    """vLLM's proposer (runner V1) or speculator (V2).

    Attributes:
        model: what it guesses with.
        layer_names: of its attention layers that have KV.
    """

    def __init__(self, proposer: Any, config: VllmConfig, layer_names: frozenset[str]) -> None:
        speculative: Any = config.speculative_config
        self._proposer = proposer
        self._method = str(speculative.method)
        # of runner V2 all have plain positions
        rows = getattr(proposer, "uses_mrope", False)
        self._rows = position_rows(speculative.draft_model_config) if rows else 0
        self._max_tokens = int(config.scheduler_config.max_num_batched_tokens)
        self.model: Any = proposer.model
        self.layer_names = layer_names

    def __call__(
        self,
        output: torch.Tensor | tuple[Any, ...],
        ids: torch.Tensor,
        following: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Write the KV of tokens that the model has just computed, as vLLM does behind a step.

        Args:
            output: of the model.
            ids, following: of the tokens and of those behind them, int32 ``[tokens]``.
            positions: int64 ``[tokens]``.
        """
        if self._method in _OF_THE_TARGET:
            ids = following
        if getattr(self._proposer, "use_heterogeneous_vocab", False):
            ids = self._proposer.vocab_mapping.map_target_to_draft_ids(ids)
        given: dict[str, Any] = {"input_ids": ids, "inputs_embeds": None}
        if getattr(self._proposer, "supports_mm_inputs", False):
            given["inputs_embeds"] = self.model.embed_input_ids(ids)
            if type(self._proposer).__name__ in _PROPOSERS:
                given["input_ids"] = None
        if self._method in _OF_THE_TARGET:
            given["hidden_states"] = self._hidden_states(output)
        self.model(positions=model_positions(positions, self._rows, self._max_tokens), **given)

    def _hidden_states(self, output: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
        import torch

        if isinstance(output, torch.Tensor):
            hidden = output
        else:  # of some layers between, which EAGLE3 reads
            hidden = torch.cat(list(output[1]), dim=-1)
        if self._method == "eagle3":
            hidden = self.model.combine_hidden_states(hidden)
        return hidden


def drafter_of(runner: Any) -> Drafter | None:
    """Of a model runner, or None where nothing is guessed by layers with KV.

    Raises:
        UnknownDrafterError: there may be such layers, and it is not known how they are called.
    """
    speculative = getattr(runner.vllm_config, "speculative_config", None)
    if speculative is None or speculative.method not in LAYERED:
        return None
    proposer = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    kind = type(proposer).__name__
    names: Any = getattr(proposer, "_draft_attn_layer_names", None)
    if names is None:
        names = getattr(proposer, "draft_attn_layer_names", None)
    if kind not in _PROPOSERS | _SPECULATORS or names is None:
        raise UnknownDrafterError(f"tokens are guessed by {kind}")
    if hasattr(runner.model, "get_mtp_target_hidden_states"):
        raise UnknownDrafterError("what is guessed from is no output of the model")
    return Drafter(proposer, runner.vllm_config, frozenset(names)) if names else None
