# SPDX-License-Identifier: Apache-2.0
"""The keys below ``trace``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcomm_vllm.config.key import MOST, key
from kvcomm_vllm.wording import one_line

FORM = "a file, new or a regular one, in a folder that this user may write to"


@dataclass(frozen=True)
class TraceConfig:
    """A line of JSON for each request that has ended, for whoever runs the server."""

    file: str = key(
        "",
        "File for these lines, for its owner alone (0600): how each request was served, without "
        "its text (docs/operating.md). Data-parallel ranks behind the first have files of their "
        "own beside it.",
        when_zero="none",
    )
    max_mb: int = key(
        100,
        "Most that lies in that file (MiB). It is begun anew then, and the last three are kept.",
        low=1,
        high=MOST,
    )
    tokens: bool = key(
        False,
        "Write down the token ids of prompts and answers, too: whoever can read the file can read "
        "these.",
    )

    def of_rank(self, rank: int) -> Path:
        """The file of a data-parallel rank."""
        path = Path(self.file).absolute()
        return path.with_name(f"{path.stem}.dp{rank}{path.suffix}") if rank else path

    def problems(self) -> Iterator[str]:
        """Why nothing can be written there by this user on this machine, a line."""
        why = _problem(Path(self.file)) if self.file else None
        if why is not None:
            yield f"trace.file: {one_line(self.file)!r} {why}; allowed: {FORM}"


def _problem(path: Path) -> str | None:
    try:
        if not stat.S_ISDIR(os.stat(path.absolute().parent).st_mode):
            return "lies in no folder"
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            return "lies in a folder that cannot be written to"
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return None if path.absolute().parent.exists() else "lies in a folder that does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be used ({one_line(str(getattr(error, 'strerror', None) or error))})"
    if not stat.S_ISREG(found):
        return "is a folder" if stat.S_ISDIR(found) else "is no regular file"
    return None if os.access(path, os.W_OK) else "cannot be written to"
