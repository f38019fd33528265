# SPDX-License-Identifier: Apache-2.0
"""A server's ``/metrics`` page: read, and summed up by one label."""

import urllib.error
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families


def read_page(base_url: str) -> str | None:
    """The page's text, or None if the server has none."""
    try:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def totals(page: str, name: str, label: str = "") -> dict[str, float]:
    """The samples called ``name``, summed over all labels but one.

    Returns a sum per value of ``label`` (under "" for samples without it); empty if the page does
    not have that metric.
    """
    # vLLM's page is long and read often: only the lines in question are parsed
    lines = [line for line in page.splitlines() if line.startswith(name)]
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families("\n".join([*lines, ""])):
        for sample in family.samples:
            if sample.name == name:
                sums[sample.labels.get(label, "")] += sample.value
    return dict(sums)
