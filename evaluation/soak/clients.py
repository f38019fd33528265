# SPDX-License-Identifier: Apache-2.0
"""Clients: each sends item after item, until the time is over, and keeps what came of them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvcomm_vllm.evaluation.soak.item import DECODE, Item, Outcome
from kvcomm_vllm.evaluation.soak.script import Script

TIMEOUT_SECONDS = 600.0
HUNG_UP = -1
DATA = b"data: "


def storm(base_url: str, model: str, script: Script, clients: int, seconds: float) -> list[Outcome]:
    """Outcomes of all items that ``clients`` send in that time, by number."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    lock = threading.Lock()

    def work(_: int) -> None:
        while time.monotonic() < end:
            outcome = send(base_url, model, script.next())
            with lock:
                outcomes.append(outcome)
            if outcome.error.startswith(ConnectionRefusedError.__name__):
                return  # nobody is there any more

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return sorted(outcomes, key=lambda outcome: outcome.item.number)


def send(base_url: str, model: str, item: Item) -> Outcome:
    """Send an item and do with its answer what the item says."""
    began = time.monotonic()
    data = item.body if isinstance(item.body, bytes) else json.dumps(item.sent(model)).encode()
    where = urllib.parse.urlsplit(base_url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, TIMEOUT_SECONDS)
    try:
        connection.request("POST", item.path, data, {"Content-Type": "application/json"})
        status, answer, error = _heard(connection, item)
    except (OSError, http.client.HTTPException) as broken:
        status, answer, error = 0, {}, f"{type(broken).__name__}: {broken}"
    finally:
        connection.close()
    return Outcome(item, status, began, time.monotonic(), answer, error)


def _heard(connection: http.client.HTTPConnection, item: Item) -> tuple[int, dict[str, Any], str]:
    """Status, answer, and the text of a refusal."""
    if item.leave and item.leave != DECODE:
        time.sleep(item.patience)
        _hang_up(connection)
        return HUNG_UP, {}, ""
    answer = connection.getresponse()
    if answer.status != 200:
        return answer.status, {}, answer.read().decode(errors="replace")
    if not (isinstance(item.body, dict) and item.body.get("stream")):
        return 200, json.loads(answer.read()), ""
    whole: dict[str, Any] = {"choices": []}
    for number, chunk in enumerate(_chunks(answer)):
        if item.leave == DECODE and number >= item.patience:
            _hang_up(connection)
            return HUNG_UP, whole, ""
        if "error" in chunk:
            return 0, whole, json.dumps(chunk["error"])
        ended = [one for one in chunk.get("choices") or [] if one.get("finish_reason")]
        whole = {**chunk, "choices": [*whole["choices"], *ended]}
    return 200, whole, ""


def _chunks(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, whatever their endpoint names them."""
    for line in answer:
        if line.startswith(DATA) and not line.startswith(DATA + b"[DONE]"):
            yield json.loads(line[len(DATA) :])


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Break the connection at once; what is on its way is not waited for."""
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
