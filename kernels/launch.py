"""Launching Triton kernels, and what every kernel declares so that it can be proven without a GPU and timed with one.

`run` is the only place where a kernel starts. It runs it on a CUDA device, or, where TRITON_INTERPRET=1 was set before Triton was
imported, in Triton's interpreter on CPU tensors. Within `recorded()` nothing runs: what would have been launched is collected instead, so
that a launcher called with tensors of the meta device tells which kernels to compile ahead of time.

Configurations (tile sizes, warps) are listed per kernel, the default first, and never chosen by timing at run time: the order of sums,
hence the last bit of a result, must not depend on which was faster today. scripts/bench_kernels.py times them all; the list's order
is where its answer goes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for this platform: the references remain
    from . import without_triton as triton
    from .without_triton import language as tl

from .interpreter import mend

__all__ = ["DTYPES", "Case", "Config", "Launch", "nbytes", "on_cuda", "on_gpu", "recorded", "run", "tl", "triton"]

Config = Mapping[str, int]  # launch options: constexpr arguments of the kernel, num_warps, num_stages
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if triton.knobs.runtime.interpret:
    mend(triton)

_recorded: ContextVar[list["Launch"] | None] = ContextVar("recorded", default=None)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name (tensors, numbers, constexprs) and options (num_warps, ...)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One public operation at one realistic size: what tests compile and compare, and the benchmark times.

    make(dtype, device) -> inputs. kernel(*inputs, config=one of configs) and reference(*inputs) return the same tensors. stock(*inputs)
    is what PyTorch would run in its place, None where there is no counterpart.

    moved(*inputs): bytes of device memory the kernel reads and writes, masked lanes and what the caches serve left out.
    floor(*inputs): the least possible, each input read once and each output written once.

    tiny(dtype, device) -> inputs so small that Triton's interpreter takes seconds over them; None leaves the case out there.
    """

    name: str
    make: Callable[[torch.dtype, str], tuple]
    kernel: Callable
    reference: Callable
    moved: Callable[..., int]
    floor: Callable[..., int]
    configs: tuple[Config, ...]
    stock: Callable | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    tolerance: float = 0.0  # of kernel against reference, relative RMS; 0: equal bit for bit
    flops: Callable[..., int] | None = None  # for matrix products, whose time is arithmetic
    notes: str = field(default="")
    tiny: Callable[[torch.dtype, str], tuple] | None = None


def on_gpu(x: Tensor) -> bool:
    """Whether public operations run a kernel for x. fp64 tensors take the reference on every device, as do CPU tensors."""
    return x.is_cuda and x.dtype != torch.float64


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, fp_fusion: bool = True, **constexprs: Any) -> None:
    """Run `kernel` on `grid` (nothing, if it is empty) with positional `arguments` and a Config and other constexprs as keywords.

    fp_fusion=False keeps a * b + c as two rounded operations, as the reference computes it. Raises RuntimeError for CPU tensors outside of
    the interpreter and where Triton is not installed.
    """
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages") if name in constexprs}
    options["enable_fp_fusion"] = fp_fusion
    record = _recorded.get()
    if record is not None:
        arguments = dict(zip(kernel.arg_names, arguments, strict=False))
        record.append(Launch(kernel, grid, {**arguments, **constexprs}, options))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    interpreted = triton.knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        raise RuntimeError(f"a Triton kernel was asked for on {device}; allowed: cuda, or cpu with TRITON_INTERPRET=1")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constexprs, **options)


def on_cuda(op: Any, kernel: Callable) -> None:
    """Let a custom op run `kernel` on CUDA tensors, its own function, the reference, on all others and on fp64."""
    op.register_kernel("cuda")(lambda x, *rest: (kernel if on_gpu(x) else op._init_fn)(x, *rest))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of these tensors."""
    return sum(t.numel() * t.itemsize for t in tensors)
