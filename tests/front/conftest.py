# SPDX-License-Identifier: Apache-2.0
"""What tests of the front end share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)
