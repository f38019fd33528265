# SPDX-License-Identifier: Apache-2.0
"""Ends an idle engine's sleep at a given moment.

While vLLM's loop goes round, its processes poll on cores that the next request needs; asleep, it
looks at nothing but its queue. So waiting for a quiet moment is left to a timer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Alarm:
    """A timer of one setting that wakes the engine.

    Args:
        wake: puts something into the engine's queue; called from another thread.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._timer: threading.Timer | None = None

    def set(self, seconds: float) -> None:
        """Wake the engine in so many seconds, and not at the moment that was set before."""
        self.stop()
        self._timer = threading.Timer(seconds, self._wake)
        self._timer.daemon = True  # an engine that ends does not wait for it
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
