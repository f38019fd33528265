# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON that cases are made of: a data folder, the packaged samples, a user's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import kvcomm_vllm
from kvcomm_vllm.cli.rows import DataError, Row, read_file, read_sample

# Evaluation data that lies beside a checkout; a wheel has none there.
BESIDE = Path(kvcomm_vllm.__file__).resolve().parents[2] / "shared" / "data"

Found = TypeVar("Found")


def named(name: str, workloads: Mapping[str, Found]) -> Found:
    """
    Raises:
        DataError: no such workload.
    """
    if name not in workloads:
        raise DataError(f"{name!r} is no workload; there are {', '.join(workloads)}")
    return workloads[name]


def data_file(name: str, folder: Path | None) -> Path | None:
    """The file in ``folder``, or without one beside the checkout; None = use the sample."""
    if folder is not None:
        return folder / name
    return BESIDE / name if (BESIDE / name).exists() else None


def _as_it_is(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class DataSet:
    """A data file, and the packaged sample that stands in for it.

    Args:
        file: name in the data folder; ``fields``: what its rows must have.
        sample: packaged file; ``expand`` makes rows as in ``file`` of each of its lines.
    """

    file: str
    fields: dict[str, type]
    sample: str
    sample_fields: dict[str, type]
    expand: Callable[[Row], list[Row]] = _as_it_is

    def rows(self, folder: Path | None) -> tuple[list[Row], str]:
        """All rows in the order of the data, and where those are from.

        Raises:
            DataError: unreadable or malformed data.
        """
        if (path := data_file(self.file, folder)) is not None:
            return read_file(path, self.fields), path.name
        return self.sample_rows(), "packaged sample"

    def sample_rows(self) -> list[Row]:
        """The rows of the packaged sample."""
        lines = read_sample(self.sample, self.sample_fields)
        return [row for line in lines for row in self.expand(line)]
