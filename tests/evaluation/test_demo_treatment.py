# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvcomm_vllm.evaluation.serving.counters import TOKENS, KVCommMeter, counted


def page(local: int, reused: int, computed: int, engine: int = 0) -> str:
    counts = {"local": local, "reused": reused, "computed": computed}
    head = "# TYPE vllm:kvcomm_tokens_total counter\n"
    return head + "".join(
        f'vllm:kvcomm_tokens_total{{engine="{engine}",treatment="{name}"}} {count}.0\n'
        for name, count in counts.items()
    )


@pytest.fixture
def metrics_server() -> Iterator[tuple[str, list[str]]]:
    """A /metrics page that shows the next of a list of texts on each visit."""
    pages: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (pages.pop(0) if len(pages) > 1 else pages[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()
    thread.join()
    server.server_close()


def treated(meter: KVCommMeter, prompt_tokens: int) -> tuple[int, int, int]:
    found = meter.take(prompt_tokens)
    return found["local"], found["reused"], found["computed"]


def test_counts_are_added_up_over_engines() -> None:
    both = page(1, 2, 3) + page(10, 20, 30, engine=1).replace("# TYPE", "# HELP")
    assert counted(both, TOKENS, "treatment") == {"local": 11, "reused": 22, "computed": 33}


def test_a_request_is_charged_with_its_own_tokens_only(
    metrics_server: tuple[str, list[str]],
) -> None:
    url, pages = metrics_server
    pages += [page(100, 200, 300), page(110, 220, 303), page(110, 225, 310)]
    meter = KVCommMeter(url)
    assert treated(meter, 33) == (10, 20, 3)
    assert treated(meter, 12) == (0, 5, 7)


def test_counts_that_arrive_late_are_waited_for(metrics_server: tuple[str, list[str]]) -> None:
    url, pages = metrics_server
    pages += [page(0, 0, 0), page(0, 0, 0), page(4, 0, 0), page(4, 5, 6)]
    assert treated(KVCommMeter(url), 15) == (4, 5, 6)


def test_a_counter_that_appears_with_the_first_request_starts_at_zero(
    metrics_server: tuple[str, list[str]],
) -> None:
    url, pages = metrics_server
    pages += ["", page(0, 0, 9)]
    assert treated(KVCommMeter(url), 9) == (0, 0, 9)
