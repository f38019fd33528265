# SPDX-License-Identifier: Apache-2.0
"""Start and stop a real vLLM server as a child process."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvcomm_vllm.cli.failure import UserError

START_TIMEOUT_SECONDS = 900.0
STOP_TIMEOUT_SECONDS = 20.0
LOG_TAIL_LINES = 15


class ServerError(UserError, RuntimeError):
    """The server did not start or died; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """A running server: where it listens and where it logs; `pid` leads its process group."""

    title: str
    base_url: str
    command: tuple[str, ...]
    log: Path
    start_seconds: float
    pid: int = 0


def stop_at_sigterm() -> None:
    """End by an exception, which stops the servers, where SIGTERM would leave them running."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminate)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last non-empty `lines` lines of a log file."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait(process: subprocess.Popen[bytes], title: str, url: str, log: Path) -> float:
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        code = process.poll()
        if code is not None:
            raise ServerError(
                f"The {title} server stopped while starting (exit status {code}).\n"
                f"End of {log}:\n{log_tail(log)}"
            )
        if _healthy(url):
            return waited
        if waited > START_TIMEOUT_SECONDS:
            raise ServerError(
                f"The {title} server was not ready after {START_TIMEOUT_SECONDS:.0f} s.\n"
                f"End of {log}:\n{log_tail(log)}"
            )
        time.sleep(0.25)


def _signal_group(group: int, number: signal.Signals) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started in its own process group."""
    group = process.pid
    _signal_group(group, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_SECONDS)
    # vLLM's engine and worker processes share the group and may outlive the API server.
    _signal_group(group, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(
    title: str,
    command: list[str],
    port: int,
    env: dict[str, str],
    log: Path,
) -> Iterator[Server]:
    """Run `command` in its own process group until the block ends.

    Errors: ServerError when the server exits or is not healthy in time, and when the block fails
    because the server has died underneath it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    base_url = f"http://127.0.0.1:{port}"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            seconds = _wait(process, title, base_url, log)
            try:
                yield Server(title, base_url, tuple(command), log, seconds, process.pid)
            except Exception as error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2.0)
                if process.poll() is None:
                    raise
                raise ServerError(
                    f"The {title} server died (exit status {process.returncode}).\n"
                    f"End of {log}:\n{log_tail(log)}"
                ) from error
        finally:
            stop_group(process)
