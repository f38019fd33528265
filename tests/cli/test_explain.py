# SPDX-License-Identifier: Apache-2.0
"""`kvcomm explain` asks a server for one token, and draws its report."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcomm_vllm.cli.main import app

FULL = {
    "prompt_tokens": 30,
    "local": 4,
    "reused": 10,
    "computed": 16,
    "declined": {},
    "spans": [[0, 4, "local"], [4, 8, "computed"], [8, 18, "reused"], [18, 30, "computed"]],
    "near": [[20, 25, 0.5, "re-encoded"]],
}
COARSE = {key: FULL[key] for key in ("prompt_tokens", "local", "reused", "computed", "declined")}


class Server(ThreadingHTTPServer):
    """A server that gives ``report``; ``asked`` is what it was sent."""

    report: dict[str, Any] | None
    asked: dict[str, dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked[self.path] = body
        if self.path == "/tokenize":
            self.answer({"tokens": list(range(30))})
        elif self.path == "/detokenize":
            self.answer({"prompt": "".join(f"<{token}>" for token in body["tokens"])})
        elif self.server.report is None:
            self.answer({"error": "no"}, 400)
        else:
            self.answer({"kv_transfer_params": {"kvcomm": self.server.report}})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *given: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.report, server.asked = FULL, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def explain(server: Server, tmp_path: Path, body: object) -> Any:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(body))
    url = f"http://127.0.0.1:{server.server_port}"
    drawn = ["--html", str(tmp_path / "page.html"), "--png", str(tmp_path / "picture.png")]
    return CliRunner().invoke(app, ["explain", str(request), "--server", url, *drawn])


def test_a_full_report_is_drawn_with_its_text(server: Server, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "stream": True, "cache_salt": "s"}
    result = explain(server, tmp_path, body)
    assert result.exit_code == 0, result.output
    assert "30 tokens: local 4, reused 10, computed 16" in result.output
    asked = server.asked["/v1/chat/completions"]
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("m", 1, False)
    assert asked["cache_salt"] == "s"
    assert asked["kv_transfer_params"] == {"kvcomm": {"explain": True}}
    page = (tmp_path / "page.html").read_text()
    for kind in ("local", "gap", "reused", "computed", "copy"):
        assert f'<span class="{kind}"' in page
    assert "&lt;8&gt;" in page
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_coarse_report_is_drawn_by_number(server: Server, tmp_path: Path) -> None:
    server.report = COARSE
    result = explain(server, tmp_path, {"prompt": "x"})
    assert result.exit_code == 0, result.output
    assert "cache_salt" in result.output
    assert "/tokenize" not in server.asked
    assert "not by place" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("body", [7, {}, {"prompt": "x", "messages": []}])
def test_what_is_no_request_is_told_in_one_line(
    server: Server, tmp_path: Path, body: object
) -> None:
    result = explain(server, tmp_path, body)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_server_that_refuses_or_is_none_is_told_in_one_line(
    server: Server, tmp_path: Path
) -> None:
    server.report = None
    refused = explain(server, tmp_path, {"prompt": "x"})
    server.report = {}
    request = str(tmp_path / "request.json")
    nobody = CliRunner().invoke(app, ["explain", request, "--server", "http://127.0.0.1:9"])
    for result in (refused, nobody):
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
    assert "status 400" in refused.stderr


# ---- of a trace ----------------------------------------------------------------------------------

RECORD = {"time": 1.0, "id": "chatcmpl-a-1", "outcome": "reused", "mode": "anchor", **FULL}
ABORTED = {"time": 2.0, "id": "chatcmpl-b-1", "outcome": "aborted", "prompt_tokens": 30}


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """Its third line was cut off, and its last one is being written."""
    path = tmp_path / "trace.jsonl"
    lines = [{**RECORD, "id": "chatcmpl-a-0", "reused": 9, "computed": 17}, RECORD, ABORTED]
    texts = [json.dumps(line) for line in lines]
    path.write_text("\n".join([*texts[:2], texts[0][:50], "", "7", texts[2], texts[1][:30]]))
    return path


@pytest.mark.parametrize("name", ["chatcmpl-a-1", "chatcmpl-a"])
def test_a_request_of_a_trace_is_drawn_without_its_text(
    traced: Path, tmp_path: Path, name: str
) -> None:
    page = tmp_path / "page.html"
    given = ["explain", str(traced), "--record", name, "--html", str(page)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "30 tokens: local 4, reused 10, computed 16" in result.output
    text = page.read_text()
    assert "chatcmpl-a-1, reused" in text
    assert "<pre>" not in text
    for kind in ("local", "gap", "reused", "computed", "copy"):
        assert f'<b class="{kind}"' in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatcmpl-x", "no request chatcmpl-x in it"),
        ("last", "chatcmpl-b-1, aborted: nothing is known of how it was served"),
    ],
)
def test_a_request_that_is_not_there_or_was_not_served_is_told_in_one_line(
    traced: Path, name: str, said: str
) -> None:
    result = CliRunner().invoke(app, ["explain", str(traced), "--record", name])
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_trace_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        result = CliRunner().invoke(app, ["explain", str(path), "--record", "last"])
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
