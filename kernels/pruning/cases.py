"""Benchmark and proof cases of block-sparse pruning."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.pruning.reference import (
    Blocks,
    Grid,
    as_matrix,
    block_grid,
    block_scores_reference,
    decode_reference,
    kept_blocks,
    take_reference,
    weight_grad_reference,
)
from actpress.kernels.pruning.triton import (
    DECODE_CONFIGS,
    SCORES_CONFIGS,
    TAKE_CONFIGS,
    block_scores_triton,
    decode_triton,
    take_triton,
)
from actpress.kernels.pruning.triton_product import EXACT_CONFIGS, TENSOR_CONFIGS, is_exact, plan_of, weight_grad_triton


def random_blocks(grid: Grid, sparsity: float, dtype: torch.dtype, device: str) -> Blocks:
    """Normal values in blocks anywhere: what benchmarks multiply."""
    kept = kept_blocks(grid, sparsity)
    index = torch.randperm(grid.down * grid.across, device=device)[:kept].sort().values.to(torch.int32)
    return Blocks(torch.randn(kept, grid.height, grid.width, dtype=dtype, device=device), index)


def cases() -> list[launch.Case]:
    """All cases of the family."""
    return [*block_cases(), *product_cases()]


def block_cases() -> list[launch.Case]:
    """Linear inputs of ResMLP-S12 at batch 128: of fc1 (25088 x 384), of fc2 (25088 x 1536), and of the cross-patch layer, a transposed
    view 128 x 384 x 196. 80% of the blocks are dropped."""

    def block_of(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Grid]:
        return x, block_grid(x.shape, block)

    def with_index(x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Tensor]:
        return x, grid, random_blocks(grid, 0.8, x.dtype, x.device.type).index

    def scores_bytes(x: Tensor, grid: Grid) -> int:
        return launch.nbytes(x) + 4 * grid.down * grid.across

    def take_bytes(x: Tensor, grid: Grid, index: Tensor) -> int:
        return index.numel() * (2 * grid.height * grid.width * x.itemsize + 4)

    def decode_inputs(block: tuple[int, int], rows: int, columns: int):
        grid = block_grid(torch.Size((rows, columns)), block)
        return lambda dtype, device: (*random_blocks(grid, 0.8, dtype, device), rows, columns)

    def decode_floor(values: Tensor, index: Tensor, rows: int, columns: int) -> int:
        return launch.nbytes(values, index) + rows * columns * values.itemsize

    def decode_bytes(values: Tensor, index: Tensor, rows: int, columns: int) -> int:
        grid = Grid(rows, columns, *values.shape[1:])  # the map: filled, set where kept, read
        return decode_floor(values, index, rows, columns) + 8 * grid.down * grid.across + 4 * index.numel()

    shapes = {
        "fc1": lambda dtype, device: torch.randn(25088, 384, dtype=dtype, device=device),
        "fc2": lambda dtype, device: torch.randn(25088, 1536, dtype=dtype, device=device),
        "patches": lambda dtype, device: torch.randn(128, 196, 384, dtype=dtype, device=device).transpose(1, 2),
    }
    chosen = [("fc1", block) for block in ((8, 8), (16, 16), (32, 32), (1, 384))]
    chosen += [("fc2", (8, 8)), ("patches", (8, 8))]
    found = []
    for layer, block in chosen:
        name = f"{layer}_{block[0]}x{block[1]}"

        def make(dtype: torch.dtype, device: str, layer: str = layer, block: tuple[int, int] = block) -> tuple:
            return block_of(shapes[layer](dtype, device), block)

        def tiny(dtype: torch.dtype, device: str, layer: str = layer, block: tuple[int, int] = block) -> tuple:
            x = torch.randn(2, 60, 40, dtype=dtype, device=device)
            return block_of(x.transpose(1, 2) if layer == "patches" else x, block)

        found += [
            launch.Case(
                f"prune_scores_{name}",
                make,
                block_scores_triton,
                lambda x, grid: block_scores_reference(as_matrix(x), grid),
                scores_bytes,
                scores_bytes,
                SCORES_CONFIGS,
                tolerance=1e-6,  # up to 1024 fp32 terms, summed in another order
                tiny=tiny,
            ),
            launch.Case(
                f"prune_take_{name}",
                lambda dtype, device, make=make: with_index(*make(dtype, device)),
                lambda x, grid, index, config: take_triton(x, grid, index, config=config),
                lambda x, grid, index: take_reference(as_matrix(x), grid, index).contiguous(),
                take_bytes,
                take_bytes,
                TAKE_CONFIGS,
                tiny=lambda dtype, device, tiny=tiny: with_index(*tiny(dtype, device)),
            ),
        ]
    for block in ((8, 8), (1, 384)):
        found.append(
            launch.Case(
                f"prune_decode_fc1_{block[0]}x{block[1]}",
                decode_inputs(block, 25088, 384),
                decode_triton,
                lambda values, index, rows, columns: decode_reference(
                    Blocks(values, index), Grid(rows, columns, *values.shape[1:])
                ).contiguous(),
                decode_bytes,
                decode_floor,
                DECODE_CONFIGS,
                tiny=decode_inputs(block, 60, 40),
            )
        )
    return found


def product_cases() -> list[launch.Case]:
    """Weight gradients of ResMLP-S12 at batch 128: fc1 (384 -> 1536) and fc2 (1536 -> 384) over 25088 tokens, blocks dropped at random.

    stock is the dense product, for which x comes along as the last input. "ieee" and "tf32" are two ways to multiply fp32.
    """

    def inputs(tokens: int, features: int, outputs: int, block: tuple[int, int], sparsity: float):
        def make(dtype: torch.dtype, device: str) -> tuple:
            x = torch.randn(tokens, features, dtype=dtype, device=device)
            dy = torch.randn(tokens, outputs, dtype=dtype, device=device)
            return *random_blocks(block_grid(x.shape, block), sparsity, dtype, device), dy, features, x

        return make

    def kernel(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor, config: launch.Config) -> Tensor:
        return weight_grad_triton(values, index, dy, columns, config)

    def reference(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> Tensor:
        return weight_grad_reference(Blocks(values, index), dy, Grid(len(dy), columns, *values.shape[1:]))

    def stock(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> Tensor:
        return dy.T @ x

    def floor(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> int:
        return launch.nbytes(values, index, dy) + 4 * dy.shape[-1] * columns

    def flops(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> int:
        return 2 * values.numel() * dy.shape[-1]

    def with_tf32(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            try:
                return function(*arguments, **options)
            finally:
                torch.set_float32_matmul_precision(before)

        return wrapped

    found = []
    for layer, features, outputs in (("fc1", 384, 1536), ("fc2", 1536, 384)):
        for side, percent in itertools.product((8, 16, 32), (80, 90)):
            name = f"prune_weight_grad_{layer}_{side}x{side}_{percent}"
            # The code is that of 80%; at 90% other groups may be faster.
            tensor, exact = (
                (TENSOR_CONFIGS, EXACT_CONFIGS) if percent == 80 else (TENSOR_CONFIGS[::2], EXACT_CONFIGS[:1])
            )
            common = {
                "make": inputs(25088, features, outputs, (side, side), percent / 100),
                "reference": reference,
                "floor": floor,
                "flops": flops,
                "tiny": inputs(100, 72, 40, (side, side), percent / 100),
            }
            plain = {**common, "kernel": kernel, "stock": stock, "moved": weight_grad_bytes}
            halves = (torch.float16, torch.bfloat16)
            # Tolerances: 2500 to 5000 fp32 terms an element in another order, and rounded towards zero on tensor cores.
            found.append(launch.Case(name, configs=tensor, dtypes=halves, tolerance=2e-5, **plain))
            found.append(launch.Case(f"{name}_ieee", configs=exact, dtypes=(torch.float32,), tolerance=5e-6, **plain))
            if percent == 80:
                found.append(
                    launch.Case(
                        f"{name}_tf32",
                        kernel=with_tf32(kernel),
                        stock=with_tf32(stock),
                        moved=with_tf32(weight_grad_bytes),
                        configs=tensor,
                        dtypes=(torch.float32,),
                        tolerance=2e-3,  # factors cut to 11 bits: up to 2^-10 of each
                        **common,
                    )
                )
    return found


def weight_grad_bytes(values: Tensor, index: Tensor, dy: Tensor, columns: int, *_: object) -> int:
    """Device memory moved in the default configuration, at most: with all block rows on the lists of those visited.

    Rows of dY and values are counted once, although programs of several columns or outputs read them: those run together, and L2 serves
    them.
    """
    rows, outputs = as_matrix(dy).shape
    grid = Grid(rows, columns, *values.shape[1:])
    plan = plan_of(grid, outputs, (EXACT_CONFIGS if is_exact(dy.dtype) else TENSOR_CONFIGS)[0])
    slot_map_bytes = 4 * (2 * grid.down * grid.across + 2 * index.numel())  # filled, read; index read, slots set
    lists = 2 * 4 * plan.groups * (grid.down * (1 + plan.group) + plan.segments)  # written, read
    sums = 4 * outputs * columns * (2 * plan.segments + 1 if plan.segments > 1 else 1)
    return launch.nbytes(values, dy) + slot_map_bytes + lists + sums
