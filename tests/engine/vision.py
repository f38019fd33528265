# SPDX-License-Identifier: Apache-2.0
"""Prompts with images for a tiny Qwen2.5-VL; what they are made into tokens by needs no
torchvision, which a CPU's environment does not have.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engines import Answer
from tiny_model import MARKERS
from vllm import LLM, SamplingParams

SIDE = 56  # of an image, in pixels: 4 patches of 14, which become 2 tokens each way
IMAGE_TOKENS = 4
START, PAD, END = (
    MARKERS[name] for name in ("vision_start_token_id", "image_token_id", "vision_end_token_id")
)


def know_images(patch: pytest.MonkeyPatch, folder: str) -> None:
    """Engines of the model in ``folder`` that start in this process take images from now on."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLProcessingInfo

    processor = _processor(folder)
    patch.setattr(Qwen2_5_VLProcessingInfo, "get_hf_processor", lambda *_, **__: processor)


def _processor(folder: str) -> Any:
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, VideosKwargs
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)

    class OfImages(Qwen2_5_VLProcessor):  # type: ignore[misc]
        """Takes no video, what is made of one being made by torchvision."""

        def check_argument_for_proper_class(self, *_: object) -> None:
            return None

    videos = SimpleNamespace(valid_kwargs=VideosKwargs)
    return OfImages(images, AutoTokenizer.from_pretrained(folder), videos)


def with_image(before: list[int], colour: int, behind: list[int]) -> dict[str, Any]:
    """A prompt with an image of one colour in it."""
    from PIL import Image

    image = Image.new("RGB", (SIDE, SIDE), (colour, 255 - colour, colour // 2))
    return {
        "prompt_token_ids": [*before, START, PAD, END, *behind],
        "multi_modal_data": {"image": image},
    }


def look(llm: LLM, prompt: dict[str, Any], tokens: int = 8) -> Answer:
    """The greedy answer to a prompt with an image."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    report = (output.kv_transfer_params or {}).get("kvcomm", {})
    return Answer(list(output.outputs[0].token_ids), report)
