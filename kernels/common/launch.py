"""Launching Triton kernels, registering operations, and what every kernel declares so that it can be proven without a GPU.

`run` is the only place where a kernel starts: on a CUDA device, or in Triton's interpreter on CPU tensors where TRITON_INTERPRET=1 was set
before Triton was imported. Within `recorded()` nothing runs; the launches are collected instead. So a launcher that is called with
tensors of the meta device shows which kernels to compile ahead of time.

`operation` registers an operation with PyTorch. Every public function with a kernel calls one.

Configurations (tile sizes, warps) are listed per kernel, the default first. They are never chosen by timing at run time: the order of sums,
hence the last bit of a result, must not depend on what was faster today. scripts/bench_kernels.py times all of them; to act on its result,
reorder the list so that the fastest configuration comes first.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for this platform: the references remain
    from actpress.kernels.common import without_triton as triton
    from actpress.kernels.common.without_triton import language as tl

from actpress.kernels.common.interpreter import mend
from actpress.kernels.common.layout import dense_as, is_channels_last

__all__ = [
    "DTYPES",
    "Case",
    "Config",
    "Launch",
    "Operation",
    "cdiv",
    "directly",
    "nbytes",
    "next_power_of_2",
    "on_gpu",
    "operation",
    "recorded",
    "run",
    "tl",
    "triton",
]

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

    make(dtype, device) -> inputs. kernel(*inputs, config=one of configs) and reference(*inputs) return the same tensors.
    stock(*inputs): what PyTorch would run instead; None where there is no counterpart.
    moved(*inputs): bytes of device memory that the kernel reads and writes, without masked lanes and what caches serve.
    floor(*inputs): the least possible bytes, each input read once and each output written once.
    tiny(dtype, device) -> inputs so small that Triton's interpreter takes seconds for them; None: the case is not interpreted.
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
    """Whether public functions run a kernel for x. CPU tensors, and fp64 tensors on every device, take the reference."""
    return x.is_cuda and x.dtype != torch.float64


def directly(x: Tensor) -> bool:
    """Whether a call may skip the registered operation: x is an ordinary CUDA tensor, and nothing observes operations.

    The registered operation costs the host 15 to 50 us more, as long as a small kernel runs. It is needed by whatever observes operations:
    torch.compile, fake tensors, dispatch modes, functorch transforms, traces, and autograd where it records, which cannot differentiate it.
    """
    return not torch.compiler.is_compiling() and x.is_cuda and plain(x)


def plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, not a lazy view of another, and nothing observes the operations on it."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, fp_fusion: bool = True, **constexprs: Any) -> None:
    """Run `kernel` on `grid`; an empty grid runs nothing.

    arguments: positional, at least one of them a tensor. constexprs: a Config and other constants of the kernel.
    fp_fusion=False keeps a * b + c as two rounded operations, as the reference computes it.
    Raises RuntimeError for CPU tensors outside of the interpreter, and where Triton is not installed.
    """
    record = _recorded.get()
    if record is not None:
        options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages") if name in constexprs}
        arguments = dict(zip(kernel.arg_names, arguments, strict=False))
        record.append(Launch(kernel, grid, {**arguments, **constexprs}, {**options, "enable_fp_fusion": fp_fusion}))
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda":
        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                f"a Triton kernel was asked for on {device}; allowed: cuda, or cpu with TRITON_INTERPRET=1"
            )
        kernel[grid](*arguments, enable_fp_fusion=fp_fusion, **constexprs)
    elif device.index == torch.cuda.current_device():
        kernel[grid](*arguments, enable_fp_fusion=fp_fusion, **constexprs)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=fp_fusion, **constexprs)


class Operation:
    """A registered operation, its reference and its Triton launcher behind one call; made by `operation`.

    A call takes the arguments of the reference. It runs the reference for CPU and fp64 tensors, the launcher for ordinary CUDA tensors (see
    `directly`), and the registered operation `op`, actpress::<name>, for all other CUDA tensors. `op` itself takes the arguments of its
    schema; on the CPU its body is the reference.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        launcher: Callable,
        empty: Callable,
        in_order: Sequence[str],
        mutates: Sequence[str],
        decides: int,
        fits: Callable[..., bool] | None,
    ):
        signature = inspect.signature(reference)
        names = list(signature.parameters)
        self.reference, self.launcher, self.decides, self.fits = reference, launcher, decides, fits
        self._mutated = tuple(names.index(argument) for argument in mutates)
        self._in_order = tuple(names.index(argument) for argument in in_order)
        self._appends_order = bool(in_order) and "channels_last" not in names
        if self._appends_order:
            order = inspect.Parameter("channels_last", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=bool)
            signature = signature.replace(parameters=[*signature.parameters.values(), order])
        self._order = list(signature.parameters).index("channels_last") if in_order else -1

        def body(*arguments: Any) -> Any:
            return _plain(reference(*self._ordered(arguments)))

        def fake(*arguments: Any) -> Any:
            return _plain(empty(*self._ordered(arguments)))

        def cuda(*arguments: Any) -> Any:
            arguments = self._ordered(arguments)
            runs = on_gpu(arguments[decides]) and (fits is None or fits(*arguments))
            return _plain((launcher if runs else reference)(*arguments))

        body.__signature__ = signature  # torch.library makes the schema from it
        self.op = torch.library.custom_op(f"actpress::{name}", body, mutates_args=tuple(mutates))
        self.op.register_fake(fake)
        self.op.register_kernel("cuda")(cuda)

    def __call__(self, *arguments: Any) -> Any:
        decisive = arguments[self.decides]
        if not on_gpu(decisive) or (self.fits is not None and not self.fits(*arguments)):
            return self.reference(*arguments)
        if not directly(decisive):
            order = (is_channels_last(arguments[self._in_order[0]]),) if self._appends_order else ()
            return self.op(*arguments, *order)
        result = self.launcher(*arguments)
        for position in self._mutated:  # as any operation that changes a tensor in place
            if not arguments[position].is_inference():
                torch.autograd.graph.increment_version(arguments[position])
        return result

    def _ordered(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Arguments of the registered operation -> those of the reference, the tensors of `in_order` brought to their memory order."""
        if not self._in_order:
            return arguments
        arguments = list(arguments)
        channels_last = arguments.pop() if self._appends_order else arguments[self._order]
        for position in self._in_order:
            arguments[position] = dense_as(arguments[position], channels_last)
        return arguments


def operation(
    name: str,
    reference: Callable,
    launcher: Callable,
    empty: Callable,
    *,
    in_order: Sequence[str] = (),
    mutates: Sequence[str] = (),
    decides: int = 0,
    fits: Callable[..., bool] | None = None,
) -> Operation:
    """Register the operation actpress::<name> and return the callable that picks it, its launcher or its reference.

    reference: the CPU body. Its annotations give the schema of the operation: tensors, numbers, strings and lists of these.
    launcher: what runs on CUDA tensors. It takes the same arguments and makes tensors dense itself where its kernel needs that.
    empty: takes the same arguments and returns tensors like those of the reference without computing them, for fake tensors.
    in_order: names of tensor arguments that the registered operation brings to the memory order `channels_last` (layout.dense_as) before
        it calls one of the three: compiled code may hand over a tensor in another memory format than the traced one. `channels_last` is an
        argument of the reference or, if it has none of this name, one that the operation has in addition, as its last: a call fills it in
        from the first tensor of `in_order`.
    mutates: names of tensor arguments that are changed in place.
    decides: position of the tensor whose device and dtype decide whether the kernel runs (`on_gpu`).
    fits: from the same arguments, whether the kernel can run on a GPU; by default it always can.
    """
    return Operation(name, reference, launcher, empty, in_order, mutates, decides, fits)


def _plain(result: Any) -> Any:
    """A NamedTuple as a plain tuple, which registered operations return."""
    return tuple(result) if isinstance(result, tuple) else result


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes the host 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 0 for 0, as Triton's own, which takes the host 5 us."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of these tensors."""
    return sum(t.numel() * t.itemsize for t in tensors)
