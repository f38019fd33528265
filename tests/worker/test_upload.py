# SPDX-License-Identifier: Apache-2.0
"""What a step tells the device goes there in one transfer, byte for byte and aligned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.compat.device import send
from kvcomm_vllm.worker import upload as module
from kvcomm_vllm.worker.upload import ALIGNED, upload

arrays = st.lists(
    st.builds(
        lambda dtype, rows, width, seed: np.random.default_rng(seed).integers(
            0, 1000, (rows, width) if width else rows, dtype=dtype
        ),
        dtype=st.sampled_from([np.int32, np.int64]),
        rows=st.integers(0, 9),
        width=st.integers(0, 3),
        seed=st.integers(0, 99),
    ),
    min_size=1,
    max_size=6,
)


class Elsewhere:
    """A device whose memory is host memory."""

    type = "elsewhere"


@given(given_arrays=arrays)
def test_all_lists_arrive_unchanged_by_one_transfer_on_aligned_addresses(
    given_arrays: list[np.ndarray],
) -> None:
    sent: list[torch.Tensor] = []

    def send(data: torch.Tensor, device: object) -> torch.Tensor:
        sent.append(data.clone())
        return sent[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "send", send)
        there = upload(given_arrays, Elsewhere())  # type: ignore[arg-type]
    assert len(sent) == 1
    for array, tensor in zip(given_arrays, there, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.itemsize % ALIGNED == 0


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    assert upload([array], torch.device("cpu"))[0].data_ptr() == array.ctypes.data


def test_what_is_sent_to_a_device_goes_vllms_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pinned memory and without waiting, of which vLLM's function takes care."""
    utils = pytest.importorskip("vllm.utils.torch_utils")
    seen = []
    monkeypatch.setattr(
        utils, "async_tensor_h2d", lambda data, device: seen.append(device) or data, raising=True
    )
    send(torch.zeros(1), torch.device("meta"))
    assert seen == [torch.device("meta")]
