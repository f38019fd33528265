# SPDX-License-Identifier: Apache-2.0
"""Who is making our connector: vLLM passes it neither its scheduler nor its engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any


def _from_the_stack(attribute: str) -> Any | None:
    """The nearest object with a method on the call stack that has this attribute, or None.

    Whoever makes a connector is on the stack of its constructor, and vLLM has no other way to it
    (its pull request 37339 is open).
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if getattr(owner, attribute, None) is not None:
            return owner
        frame = frame.f_back
    return None


def find_model_runner() -> Any | None:
    """The model runner that is just creating this worker's connector, or None."""
    worker = _from_the_stack("model_runner")
    return worker and worker.model_runner


def find_scheduler() -> Any | None:
    """The scheduler that is just creating its connector, or None."""
    return _from_the_stack("update_from_output")


def find_engine() -> Any | None:
    """The engine core that is just creating its scheduler's connector, or None."""
    return _from_the_stack("model_executor")


def find_wake_up() -> Callable[[], None] | None:
    """What ends the sleep of the engine that is just creating its scheduler's connector; may be
    called from any thread. None where the engine does not sleep (vLLM's ``LLM`` in this process).
    """
    from vllm.v1.engine import EngineCoreRequestType

    message = getattr(EngineCoreRequestType, "WAKEUP", None)
    engine = _from_the_stack("input_queue")
    if message is None or engine is None:
        return None
    return partial(engine.input_queue.put_nowait, (message, None))
