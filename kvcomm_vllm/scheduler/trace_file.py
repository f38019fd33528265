# SPDX-License-Identifier: Apache-2.0
"""A file of lines, for its owner alone, that is begun anew when it is full."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from itertools import pairwise
from pathlib import Path

OLD_FILES = 3  # kept as NAME.1, NAME.2 ..., the youngest first


class TraceFile:
    """Appends whole lines. What was cut off in the midst of a line, as by a kill or a full disk,
    stays as it is, and the next line begins on a line of its own.

    Args:
        path: new, or a regular file that no other engine writes.
        max_bytes: most that lies in it.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._file = -1
        self._size = 0
        self._torn = False  # the last line has no end
        self._open()

    def append(self, line: bytes) -> None:
        """Write a line, which ends with its newline.

        Raises:
            OSError: it is not there, or not all of it.
        """
        if not self._is_there():  # somebody has moved it away
            self._open()
        if self._size and self._size + len(line) > self._max_bytes:
            self._begin_anew()
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_there(self) -> bool:
        if self._file < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _open(self) -> None:
        self.close()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no regular file", str(self.path))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of two writers one would lose lines
            os.fchmod(file, 0o600)
            self._size = found.st_size
            self._torn = self._size > 0 and os.pread(file, 1, self._size - 1) != b"\n"
        except BlockingIOError:
            os.close(file)
            raise OSError(errno.EBUSY, "another engine writes it", str(self.path)) from None
        except OSError:
            os.close(file)
            raise
        self._file = file

    def _begin_anew(self) -> None:
        self.close()
        names = [self.path, *(Path(f"{self.path}.{n}") for n in range(1, OLD_FILES + 1))]
        for young, old in reversed([*pairwise(names)]):
            if young.exists():
                os.replace(young, old)
        self._open()
