# SPDX-License-Identifier: Apache-2.0
"""Columns: what is compared. Each is a server, and what is added to its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.evaluation.modes import DENSE, hints_of
from kvcomm_vllm.evaluation.workloads.rows import DataError

PLAIN, NO_CACHE, KVCOMM = "plain", "plain_nocache", "kvcomm"
MODES = ("rotate", "seam", "anchor", "paper")


@dataclass(frozen=True)
class Column:
    """A server, and how it is asked.

    Args:
        server: ``plain`` or ``kvcomm``, which are started here, or the name of an endpoint.
        hints: ``kv_transfer_params`` of each request.
        cached: requests find what earlier ones of the column have left in the prefix cache.
    """

    name: str
    server: str
    hints: dict[str, Any] | None = None
    cached: bool = True

    def salt(self, number: int) -> str:
        """Cache salt of the column's ``number``-th request. No two columns share one, so none
        profits from another one's pages, sequences or anchors.
        """
        return f"bench {self.name}" if self.cached else f"bench {self.name} {number}"


@dataclass(frozen=True)
class Endpoint:
    """Somebody else's server: base URL (without ``/v1``), and a model's name if it has several."""

    url: str
    model: str | None = None


def _of_mode(name: str) -> Column:
    return Column(name, KVCOMM, {"kvcomm": hints_of(name)})


OWN = {
    column.name: column
    for column in (
        Column(NO_CACHE, PLAIN, cached=False),
        Column(PLAIN, PLAIN),
        *map(_of_mode, MODES),
    )
}
# Plain vLLM without a server of its own: mode off is exact and reuses nothing but its own prefix.
OFF = {
    NO_CACHE: Column(NO_CACHE, KVCOMM, {"kvcomm": DENSE}, cached=False),
    PLAIN: Column(PLAIN, KVCOMM, {"kvcomm": DENSE}),
}


def read_endpoints(given: list[str]) -> dict[str, Endpoint]:
    """Endpoints by name, from ``NAME=URL[,model]`` each.

    Raises:
        DataError: not of that form, or a name that is taken.
    """
    found: dict[str, Endpoint] = {}
    for text in given:
        name, _, rest = text.partition("=")
        url, _, model = rest.partition(",")
        if not name or not url.startswith(("http://", "https://")):
            raise DataError(f"--endpoint {text!r} is not NAME=URL or NAME=URL,model")
        if name in OWN or name in found:
            raise DataError(f"--endpoint: there is a column {name!r} already")
        found[name] = Endpoint(url.rstrip("/").removesuffix("/v1"), model or None)
    return found


def choose_columns(names: list[str], endpoints: dict[str, Endpoint]) -> list[Column]:
    """The columns by these names (a mode may have a number: ``seam4``), and every endpoint.

    Raises:
        DataError: no such column, or none at all.
    """
    found = []
    for name in dict.fromkeys(names):
        if name in endpoints:
            continue
        try:
            found.append(OWN.get(name) or _of_mode(name))
        except DataError as error:
            known = ", ".join([*OWN, "seam4 (any number)", *endpoints])
            raise DataError(f"{name!r} is no column ({error}); there are {known}") from error
    found += [Column(name, name) for name in endpoints]
    if not found:
        raise DataError("no column to measure")
    return found
