# SPDX-License-Identifier: Apache-2.0
"""docs/support.md says of each family and option what was recorded, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import FAMILIES, HYBRID

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import support_table

ROOT = support_table.ROOT
RECORD = json.loads(support_table.RECORD.read_text())
MAKE = "run `make support`, with ARGS='-k \"NAME\"' for one family"


def test_the_page_is_that_of_the_record() -> None:
    made = support_table.page(RECORD, support_table.families())
    assert support_table.PAGE.read_text(encoding="utf-8") == made, MAKE


def test_every_family_has_been_run() -> None:
    recorded = {row for version in RECORD.values() for row in version}
    assert {*FAMILIES, *HYBRID} - recorded == set(), MAKE


def test_versions_share_a_line_only_where_they_have_the_same_outcomes() -> None:
    good = {"reuse": "on", "exactness": "passed", "layer 0": "passed", "memory": 1.0}
    record = {
        "0.30.0": {"one": good, "other": good},
        "0.32.0": {
            "one": {**good, "mixed": "1000 requests"},
            "other": {**good, "exactness": "failed"},
            "an engine": {"mixed": "1001 requests"},
        },
        "0.28.0": {"option": {"reuse": "passed"}, "MambaModel": {"reuse": "refused: mamba"}},
    }
    lines = support_table.page(record, {"one": "llama", "other": "qwen2"}).splitlines()
    for line in (
        "| llama | one | on | passed | passed | 1.00x | 0.30 0.32 |",
        "| qwen2 | other | on | passed | passed | 1.00x | 0.30 |",
        "| qwen2 | other | on | failed | passed | 1.00x | 0.32 |",
        "| option | passed | - | - | 0.28 |",
        "| MambaModel | `mamba` | 0.28 |",
        "| one | 1000 requests | 0.32 |",
        "| an engine | 1001 requests | 0.32 |",
    ):
        assert line in lines
    assert not any("an engine | -" in line for line in lines), "it is no option that was not tried"


SUITE = """
import pytest
from support_record import tell

@pytest.mark.support("layer 0")
@pytest.mark.parametrize("architecture", ["one", "other"])
def test_of_two(architecture, request):
    tell(request, 1.5)
    assert architecture == "one"

@pytest.mark.support("reuse", "option")
def test_good(): pass

@pytest.mark.support("reuse", "option")
def test_bad(): assert False

@pytest.mark.support("exactness", "option")
def test_not_here(): pytest.skip("why not")

@pytest.fixture
def broken(): raise ValueError

@pytest.mark.support("memory", "option")
def test_without_engine(broken): pass

def test_of_nothing(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_outcomes_are_recorded_and_those_of_other_tests_stay(
    tmp_path: Path, processes: int
) -> None:
    import support_record

    written = tmp_path / "record.json"
    before = {"0.1.0": {"one": {"reuse": "on"}}}
    written.write_text(json.dumps(before))
    (tmp_path / "test_of_record.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = support: of a promise\n")
    given = f"-p support_record --record-support={written} -n{processes} -p no:cacheprovider"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *given.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{Path(support_record.__file__).parent}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    found = json.loads(written.read_text())
    assert found.pop("0.1.0") == before["0.1.0"], done.stdout
    (rows,) = found.values()
    assert rows == {
        "one": {"layer 0": 1.5},
        "other": {"layer 0": "failed"},
        "option": {"reuse": "failed", "memory": "failed"},
    }
