# SPDX-License-Identifier: Apache-2.0
"""Mixed into vLLM's workers (``worker_extension_cls``): each of them works as on a GPU, from the
moment this is imported, which vLLM does before it makes the worker.
"""

from __future__ import annotations

from strided_platform import OF_RANKS, as_on_a_gpu
from worker_fault import FaultyLoad

_for_good = as_on_a_gpu(*OF_RANKS)
_for_good.__enter__()


class StridedWorker(FaultyLoad):
    def kernel_module(self) -> str:
        """Where this rank's load comes from."""
        return str(self._half().equipment.kernel.__module__)
