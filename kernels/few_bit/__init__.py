"""A piecewise-constant derivative of GELU or SiLU: which of 2^bits intervals the input lies in, and nothing else.

    code  = number of borders not above x            0 .. 2^bits - 1
    dx    = dy * levels[code]

A NaN lies in no interval: one byte for every CHUNK elements says whether there is any among them, and then dx is NaN for all of these.
Stock's is NaN for the one.

Borders and levels minimise the integral of (f' - level)^2 over the line (scripts/dev/fit_few_bit.py). Codes are kept as bit planes, plane
i holding bit i of every code, 8 elements a byte: any number of bits, 3 too, takes bits / 8 bytes an element, and the
byte of each chunk.

Source: Few-Bit Backward, arXiv 2202.00441; its shipped tables are not optimal, ours are.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.compare import DTYPES, least_not_below
from actpress.kernels.common.launch import cdiv, tl, triton
from actpress.kernels.common.layout import dense, dense_as, is_channels_last
from actpress.kernels.few_bit.tables import TABLES
from actpress.kernels.inverted import STOCK, activation
from actpress.kernels.masks import pack_mask_reference, unpack_mask_reference

BITS = (1, 2, 3, 4)
CHUNK = 1024  # elements, next to each other in memory


def code_bytes(count: int, bits: int) -> int:
    """Bytes of the code of `count` elements."""
    return bits * packed_bytes(count, 1) + _chunks(count)


def planes_of(code: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """Code of `count` elements -> its bit planes, uint8 [bits, ceil(count / 8)], and what holds a NaN, uint8 [chunks]; views."""
    planes, nans = code.split([bits * packed_bytes(count, 1), _chunks(count)])
    return planes.view(bits, packed_bytes(count, 1)), nans


def _chunks(count: int) -> int:
    return (count + CHUNK - 1) // CHUNK


def encode_reference(x: Tensor, function: str, bits: int) -> tuple[Tensor, bool]:
    """x (fp64, fp32, fp16 or bf16, any shape and strides) -> (code, uint8 [code_bytes], whether in channels_last order)."""
    codes = torch.zeros_like(x, dtype=torch.uint8, requires_grad=False)
    for border in _BORDERS[function, bits, x.dtype]:
        codes += x >= border
    planes = [pack_mask_reference((codes >> i & 1).bool()) for i in range(bits)]
    nans = (x.permute(0, 2, 3, 1) if is_channels_last(codes) else x).isnan().reshape(-1)
    nans = F.pad(nans, (0, -nans.numel() % CHUNK)).view(-1, CHUNK).any(1).to(torch.uint8)
    return torch.cat([*planes, nans]), is_channels_last(codes)


def forward_reference(x: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """(function(x) as stock PyTorch computes it, its code), both in the order of dense(x)."""
    x = dense(x)
    return STOCK[function](x), encode_reference(x, function, bits)[0]


def input_grad_reference(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code], NaN in chunks that held one, in dy's dtype; computed in fp32, in fp64 for fp64."""
    planes, nans = planes_of(code, dy.numel(), bits)
    codes = torch.zeros(dy.shape, dtype=torch.int32, device=dy.device)
    for i, plane in enumerate(planes):
        codes += unpack_mask_reference(plane, dy.shape, channels_last).to(torch.int32) << i
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    levels = torch.tensor(TABLES[function][bits]["levels"], dtype=compute, device=dy.device)
    dx = levels[codes] * dy
    nans = nans.repeat_interleave(CHUNK)[: dx.numel()] != 0
    n, c, h, w = dx.shape if channels_last else (1,) * 4
    nans = nans.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else nans.view(dx.shape)
    return dx.masked_fill_(nans, torch.nan).to(dy.dtype)


_BORDERS = {
    (function, bits, dtype): tuple(least_not_below(border, dtype) for border in table["borders"])
    for function, tables in TABLES.items()
    for bits, table in tables.items()
    for dtype in DTYPES
}


CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 8},
)


@triton.jit
def _one_of_2(b0, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """T[FIRST + STEP * n], where b0, b1, ... are the bits of n, the lowest first. Of four and eight alike: n - 1 selects."""
    return tl.where(b0, T[FIRST + STEP], T[FIRST])


@triton.jit
def _one_of_4(b0, b1, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    return tl.where(b1, _one_of_2(b0, T, FIRST + 2 * STEP, STEP), _one_of_2(b0, T, FIRST, STEP))


@triton.jit
def _one_of_8(b0, b1, b2, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    return tl.where(b2, _one_of_4(b0, b1, T, FIRST + 4 * STEP, STEP), _one_of_4(b0, b1, T, FIRST, STEP))


@triton.jit
def _byte(planes_ptr, i, group, count):
    """Where plane i keeps a group; plane BITS: the byte of a chunk."""
    return planes_ptr + i * ((tl.full([], 7, tl.int64) + count) // 8) + group


@triton.jit
def _store_code(planes_ptr, x, group, count, BORDERS: tl.constexpr, BITS: tl.constexpr):
    """Store the code of x [G, 8], G a multiple of 128: of each chunk whether it holds a NaN, and of each element the interval."""
    CHUNKS: tl.constexpr = x.numel // 1024
    nan = tl.max(tl.reshape((x != x).to(tl.int32), [CHUNKS, 1024]), axis=1)
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    tl.store(_byte(planes_ptr, BITS, chunk, count), nan.to(tl.uint8), mask=chunk * 1024 < count)
    _store_planes(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _store_planes(planes_ptr, x, group, count, BORDERS: tl.constexpr, BITS: tl.constexpr):
    """Find the code of x [G, 8], fp32, from its highest bit down: each bit says on which side of one border x lies, all found before
    say which border that is. Bit i of a code goes to bit 8 * i of a word, so that eight of them, each moved by its place, are a byte
    of every plane."""
    HALF: tl.constexpr = 2 ** (BITS - 1)  # borders are counted from 0
    top = x >= BORDERS[HALF - 1]
    word = top.to(tl.uint32) << (8 * (BITS - 1))
    if BITS > 1:
        second = x >= _one_of_2(top, BORDERS, HALF // 2 - 1, HALF)
        word |= second.to(tl.uint32) << (8 * (BITS - 2))
    if BITS > 2:
        third = x >= _one_of_4(second, top, BORDERS, HALF // 4 - 1, HALF // 2)
        word |= third.to(tl.uint32) << (8 * (BITS - 3))
    if BITS > 3:
        last = x >= _one_of_8(third, second, top, BORDERS, HALF // 8 - 1, HALF // 4)
        word |= last.to(tl.uint32)
    planes = tl.sum(word << tl.arange(0, 8)[None, :].to(tl.uint32), axis=1)  # [G]
    for i in tl.static_range(BITS):
        tl.store(_byte(planes_ptr, i, group, count), (planes >> (8 * i)).to(tl.uint8), mask=group * 8 < count)


@triton.jit
def _plane(planes_ptr, i, group, count):
    """Bit i of the codes of a group, bool [G, 8]."""
    bits = tl.load(_byte(planes_ptr, i, group, count), mask=group * 8 < count, other=0).to(tl.int32)
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def _encode_kernel(x_ptr, planes_ptr, count, BORDERS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]  # [GROUPS, 8]
    x = tl.load(x_ptr + element, mask=element < count, other=-float("inf")).to(tl.float32)  # past the end: code 0
    _store_code(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    planes_ptr,
    count,
    FUNCTION: tl.constexpr,
    BORDERS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + element, mask=element < count, other=-float("inf")).to(tl.float32)
    tl.store(y_ptr + element, activation(x, FUNCTION, x_ptr.dtype.element_ty == tl.float32), mask=element < count)
    _store_code(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _input_grad_kernel(
    dy_ptr, planes_ptr, dx_ptr, count, LEVELS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    b0 = _plane(planes_ptr, 0, group, count)
    if BITS == 1:
        level = _one_of_2(b0, LEVELS, 0, 1)
    else:
        b1 = _plane(planes_ptr, 1, group, count)
        if BITS == 2:
            level = _one_of_4(b0, b1, LEVELS, 0, 1)
        else:
            b2 = _plane(planes_ptr, 2, group, count)
            level = _one_of_8(b0, b1, b2, LEVELS, 0, 1)
            if BITS == 4:
                b3 = _plane(planes_ptr, 3, group, count)
                level = tl.where(b3, _one_of_8(b0, b1, b2, LEVELS, 8, 1), level)
    dy = tl.load(dy_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    nan = tl.load(_byte(planes_ptr, BITS, group // 128, count), mask=group * 8 < count, other=0)
    dx = tl.where(nan[:, None] != 0, float("nan"), level * dy)
    tl.store(dx_ptr + element, dx, mask=element < count)


def _grid(x: Tensor, config: launch.Config) -> tuple[int]:
    return (cdiv(x.numel(), 8 * config["GROUPS"]),)


def _new_code(x: Tensor, bits: int) -> Tensor:
    return x.new_empty(code_bytes(x.numel(), bits), dtype=torch.uint8)


def encode_triton(x: Tensor, function: str, bits: int, config: launch.Config = CONFIGS[0]) -> Tensor:
    """The code of `encode_reference(dense(x), function, bits)` in one pass; equal bit for bit."""
    x = dense(x)
    code = _new_code(x, bits)
    borders = _BORDERS[function, bits, x.dtype]
    launch.run(_encode_kernel, _grid(x, config), x, code, x.numel(), BORDERS=borders, BITS=bits, **config)
    return code


def forward_triton(x: Tensor, function: str, bits: int, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`forward_reference` in one pass; the code is equal bit for bit, y differs as that of inverted.forward_triton does."""
    x = dense(x)
    y, code = torch.empty_like(x), _new_code(x, bits)
    constexprs = {"FUNCTION": function, "BORDERS": _BORDERS[function, bits, x.dtype], "BITS": bits}
    launch.run(_forward_kernel, _grid(x, config), x, y, code, x.numel(), **constexprs, **config)
    return y, code


def input_grad_triton(
    dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`input_grad_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    levels = TABLES[function][bits]["levels"]
    launch.run(_input_grad_kernel, _grid(dy, config), dy, code, dx, dy.numel(), LEVELS=levels, BITS=bits, **config)
    return dx


@torch.library.custom_op("actpress::few_bit_encode", mutates_args=())
def _encode(x: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return encode_reference(dense_as(x, channels_last), function, bits)[0]


@_encode.register_fake
def _(x: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return _new_code(x, bits)


launch.on_cuda(
    _encode, lambda x, function, bits, channels_last: encode_triton(dense_as(x, channels_last), function, bits)
)


@torch.library.custom_op("actpress::few_bit_forward", mutates_args=())
def _forward(x: Tensor, function: str, bits: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    return forward_reference(dense_as(x, channels_last), function, bits)


@_forward.register_fake
def _(x: Tensor, function: str, bits: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), _new_code(x, bits)


launch.on_cuda(
    _forward, lambda x, function, bits, channels_last: forward_triton(dense_as(x, channels_last), function, bits)
)


@torch.library.custom_op("actpress::few_bit_input_grad", mutates_args=())
def _input_grad(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return dense_as(input_grad_reference(dy, code, function, bits, channels_last), channels_last)


@_input_grad.register_fake
def _(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_input_grad, input_grad_triton)


def encode(x: Tensor, function: str, bits: int) -> Tensor:
    """x of any shape, strides and floating dtype -> its code, uint8 [code_bytes], in the order of dense(x): channels_last where x
    is."""
    if launch.on_gpu(x):
        return launch.way(_encode, x)(x, function, bits, is_channels_last(x))
    return encode_reference(dense(x), function, bits)[0]


def forward(x: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """(function(x), encode(x)) from one read of x. On a GPU y may differ from stock's, see inverted.forward_triton."""
    if launch.on_gpu(x):
        return launch.way(_forward, x)(x, function, bits, is_channels_last(x))
    return forward_reference(x, function, bits)


def input_grad(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code]: dy of any strides and floating dtype, the code and whether it lies in channels_last order."""
    run = launch.way(_input_grad, dy) if launch.on_gpu(dy) else input_grad_reference
    return run(dy, code, function, bits, channels_last)


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B's MLP at batch 64, 64 x 197 x 3072, with the paper's 3 bits."""
    vit, tiny, code = (64, 197, 3072), (3, 7, 197), ("gelu", 3)

    def make(
        shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: str
    ) -> tuple[Tensor | str | int | bool, ...]:
        x = torch.randn(shape, dtype=dtype, device=device)
        return (torch.randn_like(x), encode_reference(x, *code)[0], *code, False) if backward else (x, *code)

    def encode_bytes(x: Tensor, *rest: object) -> int:
        return launch.nbytes(x) + code_bytes(x.numel(), code[1])

    def forward_bytes(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + code_bytes(x.numel(), code[1])

    def case(name, kernel, reference, moved, stock=None, tolerance=0.0) -> launch.Case:
        backward = name == "input_grad"
        return launch.Case(
            f"few_bit_{name}",
            partial(make, vit, backward),
            kernel,
            reference,
            moved,
            moved,
            CONFIGS,
            stock,
            tolerance=tolerance,
            tiny=partial(make, tiny, backward),
        )

    # forward: as in inverted.cases. input_grad: dy in place of x, as good for stock's time.
    return [
        case("encode", encode_triton, lambda x, *code: encode_reference(x, *code)[0], encode_bytes),
        case("forward", forward_triton, forward_reference, forward_bytes, lambda x, *_: F.gelu(x), 1e-3),
        case(
            "input_grad",
            input_grad_triton,
            input_grad_reference,
            forward_bytes,
            lambda dy, *_: torch.ops.aten.gelu_backward(dy, dy),
        ),
    ]
