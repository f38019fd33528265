# SPDX-License-Identifier: Apache-2.0
"""Requests in vLLM's front end, as ``AsyncLLM.add_request`` begins them."""

from __future__ import annotations

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest


def begin(
    processor: OutputProcessor, name: str, external: str, params: SamplingParams
) -> tuple[list[str], RequestOutputCollector]:
    """Begin a request with a prompt of three tokens.

    Args:
        name: within vLLM.
        external: by which who has sent it knows it.

    Returns the names of its samples, which the engine knows, and where their outputs arrive.
    """
    request = EngineCoreRequest(
        request_id=name,
        external_req_id=external,
        prompt_token_ids=[3, 4, 5],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    queue, names = RequestOutputCollector(params.output_kind, name), []
    parent = ParentRequest(request) if params.n > 1 else None
    for index in range(params.n):
        if parent is not None:
            child, own = parent.get_child_info(index)
            fields = {f: getattr(request, f) for f in request.__struct_fields__}
            request = EngineCoreRequest(**fields | {"request_id": child, "sampling_params": own})
        names.append(request.request_id)
        processor.add_request(request, "w3 w4 w5", parent, index, queue)
    return names, queue
