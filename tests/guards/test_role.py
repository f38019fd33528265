# SPDX-License-Identifier: Apache-2.0
"""To vLLM an engine with the plugin is a producer of KV, whichever way it was started: it accepts
what it accepts without the plugin, and gives freed pages back at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_arguments import DECODER
from serve_arguments import make_arg_parser
from since import since
from vllm import LLM
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.models import registry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from kvcomm_vllm import plugin

TEXT = {"model_type": "llama", **DECODER}
VISION = {
    "model_type": "idefics3_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "model_type": "idefics3",
    "image_token_id": 31,
    "text_config": TEXT,
    "vision_config": VISION,
}
BOTH = {"kv_connector": "kvcomm", "kv_role": "kv_both"}

Start = Callable[..., VllmConfig]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a model that takes images; there is nothing in it but its configuration."""
    # vLLM inspects each architecture in a fresh process, which takes seconds every time.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    plugin.register()
    (tmp_path / "config.json").write_text(json.dumps(MULTIMODAL))
    return str(tmp_path)


@functools.cache
def parser() -> FlexibleArgumentParser:
    """That of ``vllm serve``, with the plugin loaded; vLLM takes seconds to make it."""
    top = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(top.add_subparsers(dest="subparser").add_parser("serve"))
    return top


def serve(model: str, *flags: str) -> VllmConfig:
    """What ``vllm serve`` makes of a command line."""
    args = parser().parse_args(["serve", model, "--skip-tokenizer-init", *flags])
    args.model = args.model_tag
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def with_file(model: str, text: str, *flags: str) -> VllmConfig:
    path = Path(model) / "vllm.yaml"
    path.write_text(text)
    return serve(model, "--config", str(path), *flags)


def engine_args(model: str, transfer: Any, **more: Any) -> VllmConfig:
    args = EngineArgs(model=model, skip_tokenizer_init=True, kv_transfer_config=transfer, **more)
    return args.create_engine_config()


def offline(model: str, transfer: Any) -> VllmConfig:
    """What ``LLM`` makes of its arguments before it starts an engine."""
    made: list[VllmConfig] = []

    def instead_of_starting(engine_args: EngineArgs, **_: Any) -> None:
        made.append(engine_args.create_engine_config())
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLMEngine, "from_engine_args", instead_of_starting)
        with pytest.raises(InterruptedError):
            LLM(model=model, skip_tokenizer_init=True, kv_transfer_config=transfer)
    return made[0]


FILE = "kv-transfer-config:\n  kv_connector: kvcomm\n  kv_role: kv_both\n"
DOTTED = "--kv-transfer-config.kv_"
WAYS: dict[str, Callable[[str], VllmConfig]] = {
    "our flag": lambda m: serve(m, "--kv-connector", "kvcomm"),
    "json": lambda m: serve(m, "--kv-transfer-config", json.dumps(BOTH)),
    "dotted": lambda m: serve(m, f"{DOTTED}connector", "kvcomm", f"{DOTTED}role", "kv_both"),
    "vLLM's file, our flag": lambda m: with_file(m, "kv-connector: kvcomm\n"),
    "vLLM's file": lambda m: with_file(m, FILE),
    "arguments, dict": lambda m: engine_args(m, dict(BOTH)),
    "arguments": lambda m: engine_args(m, KVTransferConfig(**BOTH)),
    "the class's name": lambda m: engine_args(m, {**BOTH, "kv_connector": "KVCommConnector"}),
    "a producer": lambda m: engine_args(m, {**BOTH, "kv_role": "kv_producer"}),
    "offline, dict": lambda m: offline(m, dict(BOTH)),
    "offline": lambda m: offline(m, KVTransferConfig(**BOTH)),
}


def accepts(config: VllmConfig) -> tuple[bool, bool]:
    """Whether clients may send embeddings of images, and may leave them out."""
    media = config.model_config.multimodal_config
    assert media is not None
    return media.enable_mm_embeds, media.allow_missing_mm_embeddings


@pytest.mark.parametrize("start", WAYS.values(), ids=WAYS)
def test_no_way_to_start_opens_a_multimodal_server_to_embeddings(
    model: str, start: Callable[[str], VllmConfig]
) -> None:
    config = start(model)
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_role == "kv_producer"
    assert config.kv_transfer_config.is_kv_transfer_instance
    assert accepts(config) == (False, False)


@since("0.32", "embeddings for whoever is sent KV")
def test_vllm_itself_would_open_it_for_the_role_that_was_asked_for(model: str) -> None:
    """What the tests above protect from; if this fails, vLLM has changed, and they may go."""
    both = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    assert accepts(engine_args(model, both)) == (True, True)


def test_embeddings_that_the_operator_asked_for_stay_on(model: str) -> None:
    flags = ["--enable-mm-embeds", "--kv-connector", "kvcomm"]
    assert accepts(serve(model, *flags)) == (True, False)
    assert accepts(engine_args(model, dict(BOTH), enable_mm_embeds=True)) == (True, False)
