"""Launchers of DIVISION's Triton kernels.

plan.py decides from shapes which kernels run. The device code is in tiles.py (means, extremes, expected errors of a tile), parts.py
(kernels for maps that are split into parts) and codes.py (codes, and the kernels that encode and decode).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import triton
from actpress.kernels.common.layout import dense_as, empty, is_channels_last
from actpress.kernels.division import codes
from actpress.kernels.division import parts as parts_kernels
from actpress.kernels.division.plan import (
    DECODE_CONFIGS,
    ENCODE_CONFIGS,
    Strategy,
    in_order,
    shape_of,
    strategy_of,
)
from actpress.kernels.division.reference import Code, Format, empty_code, room_of

_room = functools.cache(room_of)  # not of symbolic sizes


def encode_triton(x: Tensor, seed: Tensor, format: Format, config: launch.Config = ENCODE_CONFIGS[0]) -> Code:
    """`encode_reference` with the noise of kernels/common/noise.py, elements numbered in memory order. seed: int64 [1].

    x is read once from memory as long as the maps of a program stay in a cache. Large maps, of which there are few (images, tokens), are
    split into parts; then x is read once for extremes, once for expected errors with lfc="auto", and once for codes. The same holds for
    maps with blocks of more than 16 rows and for align="authors", where the means take one more read.

    The order of sums differs from the reference: a mean may round to a neighbouring bf16, and lfc="auto" may choose differently for a map
    whose two errors agree to about 1e-5. Maps of equal means and equal choice have the same low, step and codes, bit for bit.
    """
    channels_last = is_channels_last(x)
    x = x if channels_last else x.contiguous()
    if x.numel() == 0:
        return Code(*(t.zero_() for t in empty_code(x, format)))
    shape, device = tuple(x.shape), x.device
    room = _room(shape, format)
    code = Code(
        empty(room.lfc, torch.bfloat16, device, channels_last),
        torch.empty(room.codes, dtype=torch.uint8, device=device),
        torch.empty(room.maps, dtype=torch.bfloat16, device=device),
        torch.empty(room.maps, dtype=torch.bfloat16, device=device),
    )
    means, low, step = code.lfc.view(torch.int16), code.low.view(torch.int16), code.step.view(torch.int16)
    inverse = torch.empty(room.maps, dtype=torch.float32, device=device)
    strategy = strategy_of(shape, channels_last, x.itemsize, format, *config.values())
    plan, outers = strategy.plan, strategy.outers
    options = {"num_warps": strategy.warps, "fp_fusion": False}
    if strategy.parts == 0:
        arguments = (x, seed, means, code.codes, low, step, inverse, outers)
        launch.run(codes.encode_kernel, (strategy.programs,), *arguments, P=plan, **options)
        if plan.codes:
            return code
    else:
        _encode_parts(x, means, low, step, inverse, strategy, config["LANES"])
    plan, grid = in_order(plan, outers, config["LANES"] // plan.lanes, plan.lanes)
    arguments = (x, seed, means, code.codes, low, inverse, outers)
    launch.run(codes.codes_kernel, grid, *arguments, P=plan, **options)
    return code


def _encode_parts(
    x: Tensor, means: Tensor, low: Tensor, step: Tensor, inverse: Tensor, strategy: Strategy, lanes: int
) -> None:
    """Means, low, step and the inverse of step of maps that are split into parts."""
    plan, outers, programs, warps, parts = strategy
    options = {"num_warps": warps, "fp_fusion": False}
    if plan.known:
        area = min(triton.next_power_of_2(plan.kh * plan.kw), max(lanes // plan.maps, 1))
        tile = min(triton.next_power_of_2(plan.means), max(lanes // (plan.maps * area), 1))
        how = replace(plan, known=False, tile=tile)
        grid = (programs * how.tiles,)
        launch.run(parts_kernels.means_kernel, grid, x, means, outers, P=how, LANES=area, **options)
    partials, errors = (torch.empty(k, low.numel(), parts, dtype=torch.float32, device=x.device) for k in (4, 2))
    grid, cut, lanes = (
        (programs * parts,),
        (outers, parts, triton.cdiv(plan.tiles, parts)),
        triton.next_power_of_2(parts),
    )
    launch.run(parts_kernels.partials_kernel, grid, x, means, partials, *cut, P=plan, **options)
    if plan.auto:
        arguments = (x, means, partials, errors, *cut)
        launch.run(parts_kernels.errors_kernel, grid, *arguments, P=plan, PARTS=lanes, **options)
    arguments = (means, low, step, inverse, partials, errors, outers, parts)
    how = replace(plan, known=False, tile=min(plan.tile, triton.next_power_of_2(plan.means)))
    launch.run(parts_kernels.finish_kernel, (programs,), *arguments, P=how, PARTS=lanes, **options)


def decode_triton(
    code: Code,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    format: Format,
    mask: Tensor | None = None,
    config: launch.Config = DECODE_CONFIGS[0],
) -> Tensor:
    """`decode_reference` in one pass; equal bit for bit."""
    x = empty(shape, dtype, code.codes.device, channels_last)
    if x.numel() == 0:
        return x
    means = dense_as(code.lfc, channels_last).view(torch.int16)
    plan, outers = shape_of(tuple(shape), is_channels_last(x), format)
    lanes = 16 // x.itemsize
    plan, grid = in_order(plan, outers, config["THREADS"], lanes)
    arguments = (means, code.codes, code.low.view(torch.int16), code.step.view(torch.int16), mask, x, outers)
    options = {"num_warps": config["num_warps"], "fp_fusion": False}
    launch.run(codes.decode_kernel, grid, *arguments, P=plan, LANES=lanes, **options)
    return x
