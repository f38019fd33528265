# SPDX-License-Identifier: Apache-2.0
"""Every kernel variant compiles for Ampere, Hopper and Blackwell, and is as lean as promised."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter cannot compile", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from kernel_inspection.compiled import Compiled, compile_for
from kernel_inspection.traffic import bytes_per_row, wide_accesses
from kernel_inspection.variants import Variant, all_variants, helper_launches

VARIANTS = list(all_variants())
HELPERS = helper_launches()
CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled() -> Callable[[Variant, int], Compiled]:
    by_name = {variant.name: variant for variant in VARIANTS}
    compile_once = cache(lambda name, capability: compile_for(by_name[name].launch, capability))
    return lambda variant, capability: compile_once(variant.name, capability)


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name.replace(" ", "-"))
def test_no_register_spills_and_full_width_accesses(
    variant: Variant, capability: int, compiled: Callable[[Variant, int], Compiled]
) -> None:
    code = compiled(variant, capability)
    assert code.spill_bytes == 0
    assert code.registers <= 255
    loads, stores = wide_accesses(variant, code)
    assert code.loads.count(16) >= loads, f"16-byte loads: {code.loads}"
    assert code.stores.count(16) >= stores, f"16-byte stores: {code.stores}"


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize("name", HELPERS, ids=lambda name: name.replace(" ", "-"))
def test_turns_and_codes_are_made_without_register_spills(name: str, capability: int) -> None:
    code = compile_for(HELPERS[name], capability)
    assert code.spill_bytes == 0
    assert code.registers <= 255


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.power_of_two], ids=lambda v: v.name.replace(" ", "-")
)
def test_bytes_moved_are_at_most_a_tenth_above_the_minimum(
    variant: Variant, compiled: Callable[[Variant, int], Compiled]
) -> None:
    """What programs share or read again, from L2 and L1, is taken out by formula."""
    moved = bytes_per_row(variant, compiled(variant, 90))
    assert moved >= variant.minimum, "the count misses accesses"
    assert moved - variant.shared - variant.repeated <= 1.1 * variant.minimum
