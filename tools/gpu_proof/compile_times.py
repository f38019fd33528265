# SPDX-License-Identifier: Apache-2.0
"""Seconds to compile each kernel variant for the GPU at hand, with an empty cache.

python tools/gpu_proof/compile_times.py [--capability 90] RESULTS
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--capability", type=int, help="of the GPU; default: that of this machine")
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    capability = args.capability or _capability()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        from kernel_inspection.compiled import compile_for
        from kernel_inspection.variants import all_variants

        found = {}
        for variant in all_variants():
            began = time.perf_counter()
            code = compile_for(variant.launch, capability)
            found[variant.name] = {
                "seconds": round(time.perf_counter() - began, 2),
                "registers": code.registers,
                "spill bytes": code.spill_bytes,
            }
    result = {"capability": capability, "variants": found}
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _capability() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


if __name__ == "__main__":
    main()
