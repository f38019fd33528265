# SPDX-License-Identifier: Apache-2.0
"""Forwards of our own have the adapters they ask for, and vLLM's forward has its own again."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from since import since
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from kvcomm_vllm.compat.adapters import (
    AdapterGoneError,
    NoAdapters,
    SlotAdapters,
    UnknownAdaptersError,
    adapters_of,
    weights_digest,
)

pytestmark = since("0.32", "adapters beside which KV is reused")


def layer(seed: int, scaling: float = 1.0) -> LoRALayerWeights:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 8, generator=draw).to(torch.bfloat16) for _ in range(2))
    return LoRALayerWeights("q", 4, 4, a, b.T, scaling)


def model(number: int, seed: int = 0) -> LoRAModel:
    packed = PackedLoRALayerWeights.pack([layer(seed), None, layer(seed + 1)])
    return LoRAModel(number, 4, {"q": layer(seed), "qkv": packed})


class Manager:
    """As vLLM's manager of adapters with two slots; notes the mappings its layers are given."""

    supports_mm = False
    moe_ep_load_spec = None

    def __init__(self) -> None:
        self.lora_index_to_id: list[int | None] = [None, None]
        self.registered: dict[int, LoRAModel] = {}
        self.mappings: list[LoRAMapping] = []
        self.pinned = False
        self._last_mapping: LoRAMapping | None = None
        self._last_slot_layout: tuple[int | None, ...] | None = None

    def list_adapters(self) -> dict[int, LoRAModel]:
        return dict(self.registered)

    def activate_adapter(self, number: int) -> bool:
        if number in self.lora_index_to_id:
            return False
        if self.pinned:
            raise RuntimeError("All items are pinned, cannot remove oldest from the cache.")
        self.lora_index_to_id = [*self.lora_index_to_id[1:], number]
        return True

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = tuple(self.lora_index_to_id)
        if (mapping, slots) != (self._last_mapping, self._last_slot_layout):
            assert {n for n in mapping.index_mapping if n > 0} <= set(slots)
            self.mappings.append(mapping)
            self._last_mapping, self._last_slot_layout = mapping, slots


@pytest.fixture
def manager() -> Manager:
    made = Manager()
    made.registered = {1: model(1, 10), 2: model(2, 20), 3: model(3, 30)}
    made.lora_index_to_id = [1, 2]
    return made


def runner(manager: Any | None, device: str = "cuda", **config: Any) -> Any:
    lora = SimpleNamespace(**config)
    found = SimpleNamespace(
        vllm_config=SimpleNamespace(lora_config=lora), device=torch.device(device)
    )
    if manager is not None:
        found.lora_manager = SimpleNamespace(_adapter_manager=manager)
    return found


# ---- which runners are understood ----------------------------------------------------------------


def test_an_engine_without_lora_has_none() -> None:
    plain = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
    assert isinstance(adapters_of(plain), NoAdapters)


def test_vllm_s_own_manager_is_understood() -> None:
    """Fails where vLLM has come to call its parts by other names."""
    needed = ("list_adapters", "activate_adapter", "set_adapter_mapping")
    assert all(callable(getattr(LRUCacheLoRAModelManager, name)) for name in needed)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_with_and_without_adapter_are_kept_apart_on_cpu(
    manager: Manager, device: str
) -> None:
    assert adapters_of(runner(manager, device)).apart == (device == "cpu")


@pytest.mark.parametrize("name", ["_last_slot_layout", "lora_index_to_id", "_last_mapping"])
def test_a_manager_that_lacks_something_is_not(manager: Manager, name: str) -> None:
    delattr(manager, name)
    with pytest.raises(UnknownAdaptersError, match=name):
        adapters_of(runner(manager))


def test_a_runner_without_a_manager_is_not() -> None:
    with pytest.raises(UnknownAdaptersError):
        adapters_of(runner(None))


@pytest.mark.parametrize(
    "parts",
    [
        {"supports_mm": True, "supports_tower_connector_lora": True},
        {"moe_ep_load_spec": "of this rank's experts"},
    ],
    ids=["towers", "experts"],
)
def test_adapters_of_towers_and_of_ranks_are_not(manager: Manager, parts: dict[str, Any]) -> None:
    for name, value in parts.items():
        setattr(manager, name, value)
    with pytest.raises(UnknownAdaptersError):
        adapters_of(runner(manager))


# ---- forwards ------------------------------------------------------------------------------------


def test_vllm_s_mapping_is_back_behind_ours(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    vllms = LoRAMapping((1, 1, 0), (1, 0), is_prefill=True)
    manager.set_adapter_mapping(vllms)
    with adapters.aside():
        adapters.use([2, 2, 2, 0], [2, 0])
        assert manager.mappings[-1] == LoRAMapping((2, 2, 2, 0), (2, 0), is_prefill=True)
        adapters.use([0], [0])
    assert manager.mappings[-1] == manager._last_mapping == vllms
    assert len(manager.mappings) == 4


def test_it_is_back_where_ours_has_failed(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    vllms = LoRAMapping((1,), (1,), is_prefill=True)
    manager.set_adapter_mapping(vllms)

    def fails() -> None:
        with adapters.aside():
            adapters.use([2], [2])
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert manager._last_mapping == vllms


def test_an_old_mapping_whose_adapter_is_in_no_slot_is_not_set_again(manager: Manager) -> None:
    """In an idle step: vLLM's next step sets its own."""
    adapters = SlotAdapters(manager, apart=False)
    manager.set_adapter_mapping(LoRAMapping((1,), (1,), is_prefill=True))
    assert adapters.awaken(3)
    assert manager.lora_index_to_id == [2, 3]
    with adapters.aside():
        adapters.use([3, 3], [3])
    assert manager._last_mapping == LoRAMapping((3, 3), (3,), is_prefill=True)


def test_before_vllm_s_first_step_there_is_nothing_to_set_again(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    with adapters.aside():
        adapters.use([0, 0], [0])
    assert len(manager.mappings) == 1


def test_an_adapter_in_no_slot_is_not_computed_with(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    with pytest.raises(AdapterGoneError):
        adapters.use([3], [3])
    with pytest.raises(AdapterGoneError):
        NoAdapters().use([1], [1])
    assert manager.mappings == []


def test_an_adapter_that_is_not_in_memory_is_not_awakened(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    assert not adapters.awaken(4)
    assert adapters.awaken(1)
    assert manager.lora_index_to_id == [1, 2]
    manager.pinned = True
    assert not adapters.awaken(3)
    assert not NoAdapters().awaken(1)


# ---- versions ------------------------------------------------------------------------------------


def test_weights_that_are_read_again_are_the_same_version(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    assert adapters.look() == {}
    del manager.registered[1]
    gc.collect()
    assert adapters.look() == {}
    manager.registered[1] = model(1, 10)
    assert adapters.look() == {}
    assert adapters.versions == {}


def test_other_weights_are_another_version_each_time(manager: Manager) -> None:
    adapters = SlotAdapters(manager, apart=False)
    adapters.look()
    manager.registered[1] = model(1, 11)
    assert adapters.look() == {1: 1}
    assert adapters.look() == {}
    manager.registered[1] = model(1, 10)
    assert adapters.look() == {1: 2}, "as they once were, and nobody knows what lay between"
    assert adapters.versions == {1: 2}


def test_weights_without_a_digest_are_new_whenever_they_are_read(manager: Manager) -> None:
    strange, stranger = model(1), model(1)
    strange.loras["q"] = stranger.loras["q"] = object()  # type: ignore[assignment]
    adapters = SlotAdapters(manager, apart=False)
    manager.registered = {1: strange}
    assert adapters.look() == {}
    assert adapters.look() == {}
    manager.registered = {1: stranger}
    assert adapters.look() == {1: 1}


def test_a_digest_is_of_weights_shapes_and_scales() -> None:
    same = weights_digest(model(1, 5))
    assert weights_digest(model(2, 5)) == same
    assert weights_digest(model(1, 6)) != same
    moved = model(1, 5)
    moved.loras["k"] = moved.loras.pop("q")
    assert weights_digest(moved) != same
    scaled = model(1, 5)
    scaled.loras["q"] = layer(5, scaling=2.0)
    assert weights_digest(scaled) != same
    shaped = model(1, 5)
    shaped.loras["q"].lora_a = shaped.loras["q"].lora_a.T
    assert weights_digest(shaped) != same


def test_a_digest_is_of_modules_that_were_saved_whole_too() -> None:
    def saved(value: float) -> LoRAModel:
        whole: Any = SimpleNamespace(weight=torch.full((2, 2), value), bias=None)
        return LoRAModel(1, 4, {}, modules_to_save={"score": whole})

    assert weights_digest(saved(1.0)) == weights_digest(saved(1.0)) != weights_digest(saved(2.0))
