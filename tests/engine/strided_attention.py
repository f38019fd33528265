# SPDX-License-Identifier: Apache-2.0
"""Attention over pages as on a GPU, in torch, for vLLM engines on a CPU: K and V of a head side by
side, heads and tokens in the order of the cache's layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from strided_writes import write_pages
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout


@dataclass
class StridedMetadata:
    """Views of the builder's buffers: the batch that was built last."""

    starts: torch.Tensor
    ends: torch.Tensor
    table: torch.Tensor


class StridedBuilder(AttentionMetadataBuilder[StridedMetadata]):
    """Keeps all that a batch is told in buffers of its own, which the next batch overwrites, as
    FlashAttention's builder does for CUDA graphs.
    """

    def __init__(self, spec: Any, layer_names: list[str], config: Any, device: Any) -> None:
        super().__init__(spec, layer_names, config, device)
        rows = config.scheduler_config.max_num_seqs
        width = 2 * config.model_config.max_model_len // spec.block_size
        self.starts = torch.zeros(rows + 1, dtype=torch.int32)
        self.ends = torch.zeros(rows, dtype=torch.int32)
        self.table = torch.zeros(rows, width, dtype=torch.int32)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StridedMetadata:
        given = common_attn_metadata
        rows, width = given.num_reqs, given.block_table_tensor.shape[1]
        for buffer, list_ in ((self.starts, given.query_start_loc), (self.ends, given.seq_lens)):
            buffer[: len(list_)] = list_
            buffer[len(list_) :] = 0
        self.table.zero_()
        self.table[:rows, :width] = given.block_table_tensor[:rows]
        return StridedMetadata(self.starts[: rows + 1], self.ends[:rows], self.table[:rows])


class StridedAttention(AttentionImpl[StridedMetadata]):
    """Causal attention, one request after another, in fp32."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *unused: Any,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads
        assert all(given is None for given in (others.get("sliding_window"), others.get("sinks")))

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
    ) -> None:
        write_pages(layer, key, value, cache, slots)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StridedMetadata | None,
        output: torch.Tensor,
        *unused: Any,
        **others: Any,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM measures what a step needs
            return output.fill_(0)
        starts, ends = attn_metadata.starts.tolist(), attn_metadata.ends.tolist()
        page = kv_cache.shape[2]
        for row, end in enumerate(ends):
            mine = slice(starts[row], starts[row + 1])
            if mine.stop <= mine.start:
                continue
            pages = attn_metadata.table[row, : -(-end // page)].long()
            # [pages, heads, tokens, 2 * dim] -> [heads, tokens, 2 * dim]
            held = kv_cache[pages].transpose(0, 1).flatten(1, 2)[:, :end].float()
            output[mine] = self._attend(query[mine].float(), held, end).to(output.dtype)
        return output

    def _attend(self, query: torch.Tensor, held: torch.Tensor, end: int) -> torch.Tensor:
        """Of the last tokens ``[tokens, heads, dim]`` of a request of ``end`` tokens."""
        keys, values = held.split(self.head_size, dim=-1)
        tokens = query.shape[0]
        seen = torch.arange(end) <= torch.arange(end - tokens, end)[:, None]
        found = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), keys, values, seen, scale=self.scale, enable_gqa=True
        )
        return found.transpose(0, 1)


class StridedBackend(AttentionBackend):
    """Stands in for vLLM's Triton attention.

    Attributes:
        layouts: of its pages, by vLLM's names.
        page: tokens of the pages it reads.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False
    layouts: ClassVar[tuple[KVCacheLayout, ...]] = (KVCacheLayout.LBNHC,)
    page: ClassVar[int] = 16

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls() -> type[StridedAttention]:
        return StridedAttention

    @staticmethod
    def get_builder_cls() -> type[StridedBuilder]:
        return StridedBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [StridedBackend.page]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return cls.layouts
