# SPDX-License-Identifier: Apache-2.0
"""Mixed into vLLM's workers (``worker_extension_cls``): breaks and mends what one rank does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group


class FaultyLoad:
    rank: int

    def break_load(self, rank: int) -> None:
        if self.rank == rank:
            half = self._half()
            half.whole, half.ready = half.ready, replace(half.equipment, kernel=_fail)

    def mend_load(self) -> None:
        half = self._half()
        half.ready = getattr(half, "whole", half.ready)

    def break_side_forward(self, rank: int) -> None:
        """The next forward fails in the middle of the model, and none behind it."""
        if self.rank == rank:
            part = self._half().runner.model.model.layers[1].mlp

            def fail_once(*_: object) -> None:
                del part.forward
                raise RuntimeError("no memory")

            part.forward = fail_once

    def load_facts(self) -> tuple[str | None, str]:
        """Why reuse is off on this rank, if it is, and what its pages look like."""
        facts = self._half().facts
        return facts.reason, facts.summary

    def _half(self) -> Any:
        return get_kv_transfer_group()._worker


def _fail(*_: object) -> None:
    raise RuntimeError("page lost")
