"""What scripts/dev/offsets.py finds in kernels made for it: addresses that 32 bits may not hold, and nothing in those that are right."""

import json
import os
import subprocess
import sys

import pytest

from paths import ROOT

KERNELS = """
import json, os
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import offsets

@triton.jit
def wide(x, y, indices, count, tiles):
    at = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at, mask=at < count), mask=at < count)

@triton.jit
def narrow(x, y, indices, count, tiles):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at, mask=at < count), mask=at < count)

@triton.jit
def widened_too_late(x, y, indices, count, tiles):
    at = (tl.program_id(0) * 64).to(tl.int64) + tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at, mask=at < count), mask=at < count)

@triton.jit
def rounded_up(x, y, indices, count, tiles):
    last = (count + 7) // 8
    tl.store(y + tl.minimum(tl.program_id(0).to(tl.int64), last), 1.0)

@triton.jit
def within_a_tile(x, y, indices, count, tiles):
    at = tl.program_id(0) % tiles * 64 + tl.arange(0, 64)
    first = (tl.program_id(0) // tiles).to(tl.int64) * tiles * 64
    tl.store(y + first + at, tl.load(x + first + at))

@triton.jit
def carried_offset(x, y, indices, count, tiles):
    at = tl.arange(0, 64)
    for _ in range(tiles):
        tl.store(y + at, 1.0)
        at += 64

@triton.jit
def carried_too_far(x, y, indices, count, tiles):
    at = tl.arange(0, 64)
    for _ in range(count // 64):
        tl.store(y + at, 1.0)
        at += 64

@triton.jit
def carried_pointer(x, y, indices, count, tiles):
    total = 0.0
    for i in range(tiles):
        total += tl.load(x + i * 64)
        x += 64
    tl.store(y + tl.program_id(0), total)

@triton.jit
def one_arm(x, y, indices, count, tiles):
    at = tl.program_id(0)
    if count % 3 == 0:
        at = at * 128
    tl.store(y + at, 1.0)

@triton.jit
def looked_up(x, y, indices, count, tiles):
    at = tl.load(indices + tl.program_id(0)) * 4096
    tl.store(y + at, 1.0)

@triton.jit
def looked_up_block(x, y, indices, count, tiles):
    at = tl.load(indices + tl.program_id(0)) * 8
    tl.store(y + at, 1.0)

@triton.jit
def counted(x, y, indices, count, tiles):
    place = 0
    for i in range(tiles):
        kept = (tl.load(x + i * 64 + tl.arange(0, 64)) > 0).to(tl.int32)
        tl.store(y + place + tl.cumsum(kept), 1.0)
        place += tl.sum(kept)

@triton.jit
def counted_twice(x, y, indices, count, tiles):
    place = 1
    for i in range(tiles):
        tl.store(y + place, 1.0)
        place += place

@triton.jit
def looked_up_wide(x, y, indices, count, tiles):
    at = tl.load(indices + tl.program_id(0)).to(tl.int64) * 4096
    tl.store(y + at, 1.0)

@triton.jit
def running_sum(x, y, indices, count, tiles):
    kept = (tl.load(x + tl.arange(0, 64)) > 0).to(tl.int32)
    tl.store(y + tl.cumsum(kept) + tl.sum(kept), 1.0)

@triton.jit
def hashed_data(x, y, indices, count, tiles):
    noise = tl.program_id(0).to(tl.uint32) * 0xCD9E8D57
    tl.store(y + tl.program_id(0), noise.to(tl.float32))

signature = dict(x="*fp32", y="*fp32", indices="*i32", count="i32", tiles="i32")
x = torch.empty(2**26, device="meta")
found = {}
for kernel in (v for v in list(globals().values()) if isinstance(v, triton.JITFunction)):
    compiled = triton.compile(ASTSource(kernel, signature, {}), target=GPUTarget("cuda", 90, 32))
    found[kernel.__name__] = offsets.overflows(compiled.asm["ttir"], [x, x, x, 2**26, 49], (2**20,))
print(json.dumps(found))
"""
RIGHT = (
    "wide",
    "within_a_tile",
    "carried_offset",
    "carried_pointer",
    "counted",
    "looked_up_block",
    "looked_up_wide",
    "running_sum",
    "hashed_data",
)
WRONG = {
    "narrow": "muli in 32 bits",
    "widened_too_late": "muli in 32 bits",
    "rounded_up": "addi in 32 bits gives up to 2147483654",
    "carried_too_far": "addi in 32 bits",
    "counted_twice": "addi in 32 bits",
    "one_arm": "muli in 32 bits",
    "looked_up": "muli in 32 bits",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("offsets") / "kernels.py"
    path.write_text(KERNELS)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts" / "dev")}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.quick(3)
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_pass(found, kernel):
    assert found[kernel] == []


@pytest.mark.parametrize("kernel", WRONG)
def test_overflows_are_found(found, kernel):
    assert len(found[kernel]) == 1 and found[kernel][0].startswith(WRONG[kernel])


def test_every_kernel_was_looked_at(found):
    assert set(found) == {*RIGHT, *WRONG}
