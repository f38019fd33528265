# SPDX-License-Identifier: Apache-2.0
"""A connector finds out how to wake the engine that is just making it."""

import queue
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from kvcomm_vllm.compat.owners import find_wake_up


class Engine:
    """Has its queue before it makes anything else, as vLLM's has."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.wake = self.make_connector()

    def make_connector(self) -> Any:
        return find_wake_up()


def test_the_engine_is_woken_with_a_message_that_asks_for_nothing() -> None:
    engine = Engine()
    engine.wake()
    message = engine.input_queue.get_nowait()
    assert message == (EngineCoreRequestType.WAKEUP, None)
    EngineCoreProc._handle_client_request(engine, *message)  # type: ignore[arg-type]


def test_without_such_an_engine_there_is_nobody_to_wake() -> None:
    assert find_wake_up() is None
