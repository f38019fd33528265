# SPDX-License-Identifier: Apache-2.0
"""Starting and stopping servers, with small real processes in vLLM's place."""

import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from kvcomm_vllm.evaluation.serving.server import ServerError, free_port, log_tail, running

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/die":
            import os
            print("out of memory, sorry", flush=True)
            os._exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def command(port: int, child_file: Path) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), str(child_file)]


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody has collected yet counts as ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_nothing_that_the_server_started_outlives_it(tmp_path: Path) -> None:
    port, child_file = free_port(), tmp_path / "child"
    with running("test", command(port, child_file), port, dict(os.environ), tmp_path / "log"):
        child = int(child_file.read_text())
        assert not Path(f"/proc/{child}/stat").read_text().endswith("Z")
    assert gone(child)


@pytest.mark.slow
def test_an_error_in_the_block_stops_the_server_and_comes_through(tmp_path: Path) -> None:
    port, child_file = free_port(), tmp_path / "child"
    with (
        pytest.raises(ZeroDivisionError),
        running("test", command(port, child_file), port, dict(os.environ), tmp_path / "log"),
    ):
        raise ZeroDivisionError
    assert gone(int(child_file.read_text()))


def test_a_server_that_fails_to_start_is_explained_by_its_log(tmp_path: Path) -> None:
    code = "import sys; print('no such model'); sys.exit(7)"
    with (
        pytest.raises(ServerError, match=r"exit status 7[\s\S]*no such model"),
        running("test", [sys.executable, "-c", code], 1, dict(os.environ), tmp_path / "log"),
    ):
        pass


def test_a_server_that_dies_in_use_is_explained_by_its_log(tmp_path: Path) -> None:
    port, child_file = free_port(), tmp_path / "child"
    serving = running("test", command(port, child_file), port, dict(os.environ), tmp_path / "log")

    def use() -> None:
        with serving as server, urllib.request.urlopen(f"{server.base_url}/die") as answer:
            answer.read()
            urllib.request.urlopen(f"{server.base_url}/health").close()

    with pytest.raises(ServerError, match=r"exit status 3[\s\S]*out of memory, sorry"):
        use()
    assert gone(int(child_file.read_text()))


def test_the_log_tail_is_its_last_lines_without_blanks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n\ntwo\n   \nthree\n")
    assert log_tail(log, 2) == "two\nthree"
    assert "no log" in log_tail(tmp_path / "absent")
