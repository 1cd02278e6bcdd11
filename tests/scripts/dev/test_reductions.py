"""What scripts/dev/reductions.py finds: reductions over wrong lanes in code that Triton 3.6 made, and none in our kernels."""

import json
import os
import subprocess
import sys

import pytest

from paths import ROOT

# From Triton 3.6, of tl.max(tl.reshape(x, [4, 128]), axis=1), where x is a tile [4, 16, 8]; and of a reduction of x itself.
MERGED = """
#blocked = #ttg.blocked<{sizePerThread = [1, 1, 4], threadsPerWarp = [4, 4, 2], warpsPerCTA = [1, 2, 1], order = [2, 0, 1]}>
#linear = #ttg.linear<{register = [[0, 1], [0, 2], [0, 64]], \
lane = [[0, 4], [1, 0], [2, 0], [0, 8], [0, 16]], warp = [[0, 32]], block = []}>
    %28 = tt.reshape %25 : tensor<4x16x8xf32, #blocked> -> tensor<4x128xf32, #linear>
    %29 = "tt.reduce"(%28) <{axis = 1 : i32}> ({
    ^bb0(%arg2: f32, %arg3: f32):
      %31 = arith.maxnumf %arg2, %arg3 : f32
      tt.reduce.return %31 : f32
    }) : (tensor<4x128xf32, #linear>) -> tensor<4xf32, #ttg.slice<{dim = 1, parent = #linear}>>
"""
SINGLE = MERGED.replace("#linear>)", "#blocked>)").replace("(tensor<4x128xf32", "(tensor<4x16x8xf32")

# names: cases of kernels/proof/registry.py, or none for encodings of DIVISION whose programs take several maps.
OURS = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
import torch
import compile_kernels, reductions
from actpress.kernels import division
from actpress.kernels.common import launch
from actpress.kernels.division.triton import encode_triton
from actpress.kernels.proof import registry

def scattered(launches):
    return [words for wanted in launches for words in reductions.scattered(compile_kernels.lowered(wanted, 90, "ttgir"))]

found = {}
for name in sys.argv[1:]:
    case = registry.all_cases()[name]
    for dtype in case.dtypes:
        found[f"{name} {dtype}"] = scattered(registry.launches(case, dtype, case.configs[0]))
for size in (14, 24, 28, 32) if not found else ():
    for lfc in division.LFC:
        with launch.recorded() as launches:
            seed = torch.empty(1, dtype=torch.int64, device="meta")
            encode_triton(torch.empty(2, 3, size, size, device="meta"), seed, division.Format((8, 8), 8, "ceil", lfc))
        found[f"{size} {lfc}"] = scattered(launches)
print(json.dumps(found))
"""


def ours(*names):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts" / "dev")}
    done = subprocess.run([sys.executable, "-c", OURS, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reductions_over_merged_axes_are_found(script):
    scattered = script("reductions").scattered
    assert scattered(MERGED) == ["axis 1 of 4x128xf32: bits [0, 3, 4] of the lane"]
    assert scattered(SINGLE) == []
    with pytest.raises(ValueError, match="only 1 of the reductions"):
        scattered(MERGED + '"tt.reduce"')


@pytest.mark.slow
def test_division_reduces_over_the_right_threads():
    found = ours()
    assert len(found) == 8 and not any(found.values()), found


@pytest.mark.slow
def test_every_kernel_reduces_over_the_right_threads():
    from actpress.kernels.proof import registry

    found = ours(*registry.all_cases())
    assert len(found) > 200 and not any(found.values()), {name: words for name, words in found.items() if words}
