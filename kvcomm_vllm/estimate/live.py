# SPDX-License-Identifier: Apache-2.0
"""One request to a running server, and the picture of its report."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.estimate.flaws import EstimateError
from kvcomm_vllm.estimate.picture import KINDS, Picture, Piece, of_report
from kvcomm_vllm.wording import one_line, shown

TIMEOUT = 600.0
FIELDS = ("messages", "prompt", "tools", "model", "chat_template_kwargs")  # of a tokenization
Body = dict[str, Any]


@dataclass(frozen=True)
class Explained:
    """``full``: the report says where in the prompt what was reused."""

    report: Mapping[str, Any]
    picture: Picture
    full: bool


def explain(server: str, body: Mapping[str, Any]) -> Explained:
    """Send a request for one token, and draw what its report says of the prompt.

    Raises:
        EstimateError: the server does not answer, refuses, or gives no report.
    """
    chat = "messages" in body
    if chat == ("prompt" in body):
        raise EstimateError("the request must have either messages or a prompt")
    asked: Body = {"model": _model(server), **body, "stream": False, "max_tokens": 1, "n": 1}
    asked.pop("max_completion_tokens", None)
    asked.pop("stream_options", None)
    given = body.get("kv_transfer_params")
    hints = given.get("kvcomm") if isinstance(given, Mapping) else None
    hints = {**hints, "explain": True} if isinstance(hints, Mapping) else {"explain": True}
    asked["kv_transfer_params"] = {"kvcomm": hints}
    answer = _post(server, "/v1/chat/completions" if chat else "/v1/completions", asked)
    params = answer.get("kv_transfer_params")
    report = params.get("kvcomm") if isinstance(params, Mapping) else None
    if not isinstance(report, Mapping):
        raise EstimateError("no report in the response: is it a server with the plugin?")
    return _explained(server, asked, report)


def _explained(server: str, asked: Body, report: Mapping[str, Any]) -> Explained:
    total = int(report["prompt_tokens"])
    spans = report.get("spans")
    if spans is None:
        title = f"{total:,} tokens, by number and not by place: the report is coarse"
        return Explained(report, Picture(title, _by_number(report)), False)
    title = f"A prompt of {total:,} tokens"
    pieces = of_report(spans, report.get("near") or ())
    tokens = _tokens(server, asked)
    if len(tokens) != total:  # of another template or tokenizer than the request's
        return Explained(report, Picture(title, pieces), True)

    def text(start: int, end: int) -> str:
        said = _post(server, "/detokenize", {"model": asked["model"], "tokens": tokens[start:end]})
        return str(said.get("prompt", ""))

    return Explained(report, Picture(title, pieces, text), True)


def _by_number(report: Mapping[str, Any]) -> list[Piece]:
    pieces, start = [], 0
    for word in ("local", "reused", "computed"):
        end = start + int(report[word])
        pieces.append(Piece(start, end, KINDS[word]))
        start = end
    return [piece for piece in pieces if piece.tokens]


def _tokens(server: str, asked: Body) -> list[int]:
    """The prompt's tokens; none where the server does not tell."""
    question = {key: asked[key] for key in FIELDS if key in asked}
    try:
        found = _post(server, "/tokenize", question).get("tokens")
    except EstimateError:
        return []
    return found if isinstance(found, list) else []


def _model(server: str) -> str:
    models = _json(server, urllib.request.Request(_url(server, "/v1/models"))).get("data")
    first = models[0] if isinstance(models, list) and models else None
    return str(first.get("id")) if isinstance(first, Mapping) else ""


def _post(server: str, path: str, body: Body) -> Body:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return _json(server, urllib.request.Request(_url(server, path), data, headers))


def _url(server: str, path: str) -> str:
    if not server.startswith(("http://", "https://")):
        raise EstimateError(f"{one_line(server)}: not a URL like http://localhost:8000")
    return server.rstrip("/").removesuffix("/v1") + path


def _json(server: str, request: urllib.request.Request) -> Body:
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode("utf-8", "replace").split())
        raise EstimateError(f"{server}: status {error.code}: {one_line(said)}") from None
    except (OSError, ValueError) as error:
        raise EstimateError(f"{server}: {one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise EstimateError(f"{server}: answers with {shown(found)}")
    return found
