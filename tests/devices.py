"""Running kernels in tests: in Triton's interpreter on a CPU, and on a CUDA device.

`BACKENDS` parametrises a test with (device, dtype). bf16 is left to the device: the interpreter truncates where hardware rounds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import triton

INTERPRETED = triton.knobs.runtime.interpret
_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET is not 1")

BACKENDS = [
    pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=_interpreter),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=_interpreter),
    pytest.param("cuda", torch.float32, id="cuda-fp32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
]
DEVICES = [
    pytest.param("cpu", id="interpreter", marks=_interpreter),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def assert_same(name: str, ours: Tensor, reference: Tensor) -> None:
    """Equal bit for bit, NaN to NaN; -0 equals 0."""
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), f"{name}: {ours.shape} {ours.dtype}"
    different = ~torch.isclose(ours, reference, rtol=0, atol=0, equal_nan=True)
    assert not different.any(), f"{name}: {int(different.sum())} of {ours.numel()} elements differ"


def assert_close(name: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    """||ours - reference|| <= tolerance * ||reference||, in fp64; NaN never passes."""
    assert ours.shape == reference.shape, f"{name}: {ours.shape}"
    ours, reference = ours.double(), reference.double()
    error = float((ours - reference).norm() / reference.norm().clamp(min=1e-300))
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


@dataclass
class Traffic:
    """Bytes that programs read and wrote, as counted in the interpreter."""

    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written


@contextmanager
def traffic(on_chip: int = 96 * 1024) -> Iterator[Traffic]:
    """Count the device memory that kernels move, in the interpreter. Masked lanes move nothing.

    A program that reads an address again is served by a cache, and not counted, as long as all it reads and writes fits in `on_chip` bytes;
    so is one that reads what it wrote. What two programs read is counted twice.
    """
    builder = triton.runtime.interpreter.interpreter_builder
    counted = Traffic()
    reads: dict[tuple, list[tuple[np.ndarray, int]]] = {}
    writes: dict[tuple, list[tuple[np.ndarray, int]]] = {}
    load, store, grid = builder.create_masked_load, builder.create_masked_store, []

    def note(table, ptrs, mask):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        data, inside = np.broadcast_arrays(ptrs.data, mask.data)
        table.setdefault((len(grid), *builder.grid_idx), []).append((np.unique(data[inside.astype(bool)]), size))

    def counting_load(ptrs, mask, *rest, **options):
        note(reads, ptrs, mask)
        return load(ptrs, mask, *rest, **options)

    def counting_store(ptrs, value, mask, *rest, **options):
        note(writes, ptrs, mask)
        return store(ptrs, value, mask, *rest, **options)

    def new_launch(*dims):
        grid.append(dims)
        return set_grid_dim(*dims)

    set_grid_dim = builder.set_grid_dim
    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.set_grid_dim = new_launch
    try:
        yield counted
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim
        for program in reads.keys() | writes.keys():
            r, w = reads.get(program, []), writes.get(program, [])
            unique_read, unique_written = _unique(r), _unique(w)
            counted.written += sum(len(a) * size for a, size in w)
            if sum(len(a) * size for a, size in (*unique_read.values(), *unique_written.values())) > on_chip:
                counted.read += sum(len(a) * size for a, size in r)
            else:
                own = (
                    np.concatenate([a for a, _ in unique_written.values()])
                    if unique_written
                    else np.empty(0, np.uint64)
                )
                counted.read += sum(len(np.setdiff1d(a, own)) * size for a, size in unique_read.values())


def _unique(accesses: list[tuple[np.ndarray, int]]) -> dict[int, tuple[np.ndarray, int]]:
    """Distinct addresses per size of element."""
    by_size: dict[int, list[np.ndarray]] = {}
    for addresses, size in accesses:
        by_size.setdefault(size, []).append(addresses)
    return {size: (np.unique(np.concatenate(parts)), size) for size, parts in by_size.items()}


@contextmanager
def last_program_only() -> Iterator[None]:
    """Run only the last program of each launch, in the interpreter: for tensors of more than 2^31 elements."""
    executor = triton.runtime.interpreter.GridExecutor
    builder = triton.runtime.interpreter.interpreter_builder
    call, grid_dim = executor.__call__, builder.set_grid_dim

    def run_last(self, *arguments, **options):
        dims = self.grid
        self.grid = (1,) * len(dims)
        builder.set_grid_dim = lambda *_: grid_dim(*dims, *(1,) * (3 - len(dims)))
        builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", tuple(d - 1 for d in (*dims, 1, 1)[:3]))
        try:
            return call(self, *arguments, **options)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    executor.__call__ = run_last
    try:
        yield
    finally:
        executor.__call__ = call


def mimic_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors through the registered operations too, as CUDA tensors go; there they run the reference."""
    monkeypatch.setattr(launch, "on_gpu", lambda x: x.dtype != torch.float64)
