# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: whose a request is, what weights they have, and forwards of our own with them.

vLLM (0.32) sets the adapters of a step's tokens before it has connectors load, in buffers that all
layers read. A forward beside it sets its own there, and then vLLM's again. It has the adapters that
vLLM has in its slots: none is read from a file for it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import xxhash
from vllm.logger import init_logger

from kvcomm_vllm.guards.version import older_than

if TYPE_CHECKING:
    import torch
    from vllm.v1.request import Request

logger = init_logger("vllm.kvcomm.worker")

# What is used of vLLM's manager of adapters.
_NEEDED = (
    "_last_mapping",
    "_last_slot_layout",  # without it a changed slot behind an unchanged mapping is overlooked
    "lora_index_to_id",
    "moe_ep_load_spec",
    "list_adapters",
    "activate_adapter",
    "set_adapter_mapping",
)


class UnknownAdaptersError(TypeError):
    """How this engine keeps its adapters is not known."""


class AdapterGoneError(RuntimeError):
    """An adapter is in no slot, and so cannot be computed with."""


def adapter_number(request: Request) -> int:
    """What vLLM calls the request's adapter; 0 for the model as it is."""
    adapter = getattr(request, "lora_request", None)
    return 0 if adapter is None else int(adapter.lora_int_id)


def adapter_names(request: Request) -> tuple[str, str] | None:
    """Name and path of the request's adapter, with which vLLM makes its pages' hashes as well."""
    adapter = getattr(request, "lora_request", None)
    return None if adapter is None else (str(adapter.lora_name), str(adapter.lora_path))


class Adapters(Protocol):
    """The adapters of one rank, by vLLM's numbers; 0 is the model as it is.

    Attributes:
        apart: tokens with and without adapter must not meet in one forward.
        versions: of those whose weights were replaced, how often.
    """

    apart: bool
    versions: dict[int, int]

    def look(self) -> dict[int, int]:
        """New versions of those whose weights were replaced since this was last asked."""

    def awaken(self, number: int) -> bool:
        """Get an adapter into a slot, maybe another one's; False if it is not in memory any more.
        Only in steps of which vLLM computes nothing itself.
        """

    def aside(self) -> AbstractContextManager[None]:
        """A context for forwards of our own: behind it all is as vLLM has left it."""

    def use(self, tokens: Sequence[int], ends: Sequence[int]) -> None:
        """Compute the next forward's tokens with these adapters, and its last projection's rows.

        Raises:
            AdapterGoneError: one of them is in no slot.
        """


def adapters_of(runner: Any) -> Adapters:
    """Those of a model runner (V1 or V2).

    Raises:
        UnknownAdaptersError: it has adapters, and is not understood.
    """
    if getattr(runner.vllm_config, "lora_config", None) is None:
        return NoAdapters()
    if older_than((0, 32)):
        raise UnknownAdaptersError("reuse with adapters was never run before vLLM 0.32")
    manager: Any = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    missing = [name for name in _NEEDED if not hasattr(manager, name)]
    if missing:
        raise UnknownAdaptersError(f"vLLM's manager of adapters has no {missing[0]}")
    if getattr(manager, "supports_mm", False) and manager.supports_tower_connector_lora:
        # what it has set last may then be of an image, and the text's is not known any more
        raise UnknownAdaptersError("adapters of image towers (enable_tower_connector_lora)")
    if manager.moe_ep_load_spec is not None:
        raise UnknownAdaptersError("ranks have adapters of different experts")
    return SlotAdapters(manager, apart=runner.device.type == "cpu")


class NoAdapters:
    """The engine knows none."""

    apart = False

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}

    def look(self) -> dict[int, int]:
        return {}

    def awaken(self, number: int) -> bool:
        return False

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def use(self, tokens: Sequence[int], ends: Sequence[int]) -> None:
        if any(ends):
            raise AdapterGoneError("this engine has no adapters")


class SlotAdapters:
    """Adapters in vLLM's slots.

    Args:
        manager: vLLM's ``LRUCacheLoRAModelManager``.
        apart: on CPU vLLM takes the last slot's adapter for tokens without one, unless a whole
            forward has none.
    """

    def __init__(self, manager: Any, apart: bool) -> None:
        self._manager = manager
        self.apart = apart
        self.versions: dict[int, int] = {}
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._digests: dict[int, bytes] = {}

    def look(self) -> dict[int, int]:
        """Weights are told apart by what they are: vLLM drops adapters and reads them from their
        files again as it likes, and whoever replaces one tells nobody else.
        """
        replaced: dict[int, int] = {}
        for number, adapter in self._manager.list_adapters().items():
            seen = self._seen.get(number)
            if seen is not None and seen() is adapter:
                continue
            self._seen[number] = weakref.ref(adapter)
            try:
                digest = weights_digest(adapter)
            except Exception:  # of another version: whatever is read anew counts as replaced
                logger.debug("kvcomm: weights of adapter %d have no digest", number, exc_info=True)
                digest = os.urandom(16)
            if self._digests.setdefault(number, digest) != digest:
                self._digests[number] = digest
                self.versions[number] = replaced[number] = self.versions.get(number, 0) + 1
        return replaced

    def awaken(self, number: int) -> bool:
        manager = self._manager
        if number not in manager.list_adapters():
            return False
        try:
            manager.activate_adapter(number)
        except (RuntimeError, ValueError):  # an operator has pinned others to all slots
            return False
        return number in manager.lora_index_to_id

    @contextmanager
    def aside(self) -> Iterator[None]:
        before = self._manager._last_mapping
        try:
            yield
        finally:
            # in an idle step it may be of adapters that are gone: vLLM's next one sets its own
            if before is not None and self._has(before.index_mapping, before.prompt_mapping):
                self._manager.set_adapter_mapping(before)

    def use(self, tokens: Sequence[int], ends: Sequence[int]) -> None:
        from vllm.lora.layers import LoRAMapping

        if not self._has(tokens, ends):
            raise AdapterGoneError("an adapter of this forward is in no slot")
        # "prefill" as vLLM itself says of every batch
        self._manager.set_adapter_mapping(LoRAMapping(tuple(tokens), tuple(ends), is_prefill=True))

    def _has(self, *mappings: Sequence[int]) -> bool:
        numbers = {number for mapping in mappings for number in set(mapping) if number > 0}
        return numbers <= set(self._manager.lora_index_to_id)


def weights_digest(adapter: Any) -> bytes:
    """Of all weights of vLLM's ``LoRAModel``, 16 bytes. It is read through once each time vLLM has
    read it from its files, which takes longer.
    """
    digest = xxhash.xxh3_128()
    for name, layer in sorted(adapter.loras.items()):
        digest.update(f"{name} {layer.scaling}".encode())
        for part in (layer.lora_a, layer.lora_b):
            for weights in part if isinstance(part, (list, tuple)) else (part,):
                _add(digest, weights)
    for name, layer in sorted(adapter.modules_to_save.items()):
        digest.update(name.encode())
        _add(digest, layer.weight)
        _add(digest, layer.bias)
    return digest.digest()


def _add(digest: Any, weights: torch.Tensor | None) -> None:
    if weights is None:
        digest.update(b"none")
        return
    import torch

    digest.update(f"{weights.dtype} {tuple(weights.shape)}".encode())
    plain = weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(plain.numpy())
