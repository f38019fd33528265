# SPDX-License-Identifier: Apache-2.0
"""Attention metadata for forwards of our own, made as vLLM's attention groups make theirs (0.28 -
0.33).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

# What a group keeps of its own builders; fields of vLLM's AttentionGroup, some of 0.32+.
OWN_STATE: dict[str, Any] = {"kernel_block_table": None, "kernel_block_offsets": None}


class MetadataBuilder:
    """Builds the attention metadata of one of vLLM's attention groups, with a builder of its own.

    vLLM's builders keep state of the step whose metadata is already built (FlashAttention's
    scheduler buffer under full graphs, FlashInfer's planned wrapper), which a second use would
    destroy.

    Args:
        group: vLLM's attention group, whose builders exist.
        kernel_block_size: tokens per page that vLLM chose for the group's attention kernels; None:
            the block tables' own.
    """

    def __init__(
        self, group: Any, vllm_config: Any, device: torch.device, kernel_block_size: int | None
    ) -> None:
        known = {field.name for field in dataclasses.fields(group)}
        own = {name: value for name, value in OWN_STATE.items() if name in known}
        self._group = dataclasses.replace(group, metadata_builders=[], **own)
        self._group.create_metadata_builders(vllm_config, device, kernel_block_size)
        self._builder = self._group.get_metadata_builder()
        self._maps_tables = not hasattr(group, "build_metadata")
        _share_workspace(group.get_metadata_builder(), self._builder)

    @property
    def layer_names(self) -> list[str]:
        return list(self._group.layer_names)

    @property
    def number(self) -> int:
        """Which of vLLM's KV cache groups it belongs to."""
        return int(self._group.kv_cache_group_id)

    @property
    def block_size(self) -> int:
        """Tokens per page of the block tables it is given."""
        return int(self._group.kv_cache_spec.block_size)

    @property
    def kernel_block_size(self) -> int:
        """Tokens per page that attention reads."""
        return int(self._builder.kv_cache_spec.block_size)

    def build(self, common: CommonAttentionMetadata) -> Any:
        """Metadata for a batch; its block table names pages of :attr:`block_size` tokens."""
        if self._maps_tables:  # before vLLM 0.32 runners keep tables of the kernels' pages
            pages = self.block_size // self.kernel_block_size
            table = kernel_table(common.block_table_tensor, pages)
            common = dataclasses.replace(common, block_table_tensor=table)
            return self._builder.build(0, common)
        return self._group.build_metadata(common)


def metadata_builders(runner: Any) -> list[MetadataBuilder]:
    """One builder per attention group of the model runner (V1 or V2), made like vLLM's."""
    from vllm.config import set_current_vllm_config

    config = runner.vllm_config
    sizes = getattr(runner, "kernel_block_sizes", None) or getattr(
        runner, "_kernel_block_sizes", []
    )
    found = []
    with set_current_vllm_config(config):  # backends choose kernels, and their pages, by it
        for group in (group for groups in runner.attn_groups for group in groups):
            number = group.kv_cache_group_id
            size = sizes[number] if number < len(sizes) else None
            found.append(MetadataBuilder(group, config, runner.device, size))
    return found


def kernel_table(table: torch.Tensor, pages: int) -> torch.Tensor:
    """A block table ``[rows, blocks]`` in pages that are ``pages`` times smaller: ``[rows, blocks *
    pages]``.
    """
    import torch

    if pages == 1:
        return table
    parts = torch.arange(pages, dtype=table.dtype, device=table.device)
    return (table.unsqueeze(-1) * pages + parts).flatten(1)


def _share_workspace(builder: Any, own: Any) -> None:
    """Have ``own`` work in the other builder's buffer, as vLLM's groups share one: kernels of one
    stream never need two, and it is up to hundreds of megabytes (FlashInfer; MLA's context).
    """
    if hasattr(builder, "chunked_prefill_workspace"):
        own.chunked_prefill_workspace = builder.chunked_prefill_workspace
    if hasattr(builder, "_get_workspace_buffer") and hasattr(own, "set_workspace_buffer"):
        workspace = builder._get_workspace_buffer()
        if workspace is not None:
            own.set_workspace_buffer(workspace)


def common_metadata(**fields: Any) -> Any:
    """``CommonAttentionMetadata`` from the fields this vLLM version knows."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**{k: v for k, v in fields.items() if k in known})
