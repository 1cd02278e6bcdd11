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

INPUTS = {  # of Linear layers of ResMLP-S12 at batch 128; the cross-patch layer reads a transposed view
    "fc1": lambda dtype, device: torch.randn(25088, 384, dtype=dtype, device=device),
    "fc2": lambda dtype, device: torch.randn(25088, 1536, dtype=dtype, device=device),
    "patches": lambda dtype, device: torch.randn(128, 196, 384, dtype=dtype, device=device).transpose(1, 2),
}


def random_blocks(grid: Grid, sparsity: float, dtype: torch.dtype, device: str) -> Blocks:
    """Normal values in blocks at random positions."""
    kept = kept_blocks(grid, sparsity)
    index = torch.randperm(grid.down * grid.across, device=device)[:kept].sort().values.to(torch.int32)
    return Blocks(torch.randn(kept, grid.height, grid.width, dtype=dtype, device=device), index)


def cases() -> list[launch.Case]:
    """All cases of the family. 80% of the blocks are dropped, if the name gives no other number."""
    blocks = [("fc1", block) for block in ((8, 8), (16, 16), (32, 32), (1, 384))]
    blocks += [("fc2", (8, 8)), ("patches", (8, 8))]
    return [
        *(case for layer, block in blocks for case in _encode_cases(layer, block)),
        *(_decode_case(block) for block in ((8, 8), (1, 384))),
        *product_cases(),
    ]


def _encode_cases(layer: str, block: tuple[int, int]) -> list[launch.Case]:
    """Scores, and copying of the kept blocks, of the input of one layer."""

    def make(dtype: torch.dtype, device: str) -> tuple[Tensor, Grid]:
        x = INPUTS[layer](dtype, device)
        return x, block_grid(x.shape, block)

    def tiny(dtype: torch.dtype, device: str) -> tuple[Tensor, Grid]:
        x = torch.randn(2, 60, 40, dtype=dtype, device=device)
        x = x.transpose(1, 2) if layer == "patches" else x
        return x, block_grid(x.shape, block)

    def with_index(x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Tensor]:
        return x, grid, random_blocks(grid, 0.8, x.dtype, x.device.type).index

    def scores_bytes(x: Tensor, grid: Grid) -> int:
        return launch.nbytes(x) + 4 * grid.down * grid.across

    def take_bytes(x: Tensor, grid: Grid, index: Tensor) -> int:
        return index.numel() * (2 * grid.height * grid.width * x.itemsize + 4)

    name = f"{layer}_{block[0]}x{block[1]}"
    return [
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
            lambda dtype, device: with_index(*make(dtype, device)),
            lambda x, grid, index, config: take_triton(x, grid, index, config=config),
            lambda x, grid, index: take_reference(as_matrix(x), grid, index).contiguous(),
            take_bytes,
            take_bytes,
            TAKE_CONFIGS,
            tiny=lambda dtype, device: with_index(*tiny(dtype, device)),
        ),
    ]


def _decode_case(block: tuple[int, int]) -> launch.Case:
    """Decoding of the input of fc1."""

    def inputs(rows: int, columns: int):
        grid = block_grid(torch.Size((rows, columns)), block)
        return lambda dtype, device: (*random_blocks(grid, 0.8, dtype, device), rows, columns)

    def reference(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
        return decode_reference(Blocks(values, index), Grid(rows, columns, *values.shape[1:])).contiguous()

    def floor(values: Tensor, index: Tensor, rows: int, columns: int) -> int:
        return launch.nbytes(values, index) + rows * columns * values.itemsize

    def moved(values: Tensor, index: Tensor, rows: int, columns: int) -> int:
        grid = Grid(rows, columns, *values.shape[1:])  # the map: filled, set where kept, read
        return floor(values, index, rows, columns) + 8 * grid.down * grid.across + 4 * index.numel()

    return launch.Case(
        f"prune_decode_fc1_{block[0]}x{block[1]}",
        inputs(25088, 384),
        decode_triton,
        reference,
        moved,
        floor,
        DECODE_CONFIGS,
        tiny=inputs(60, 40),
    )


def product_cases() -> list[launch.Case]:
    """Weight gradients of ResMLP-S12 at batch 128: fc1 (384 -> 1536) and fc2 (1536 -> 384) over 25088 tokens, blocks dropped at random.

    stock is the dense product; the last input is its x. "ieee" and "tf32" are two ways to multiply fp32.
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
            # The compiled code is that of 80%; at 90% another width of the groups may be faster.
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
            # Tolerances: 2500 to 5000 fp32 terms per element in another order, rounded towards zero on tensor cores.
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
                        tolerance=2e-3,  # factors rounded to 11 bits: up to 2^-10 of each
                        **common,
                    )
                )
    return found


def weight_grad_bytes(values: Tensor, index: Tensor, dy: Tensor, columns: int, *_: object) -> int:
    """The most device memory that the default configuration moves: that of all block rows being visited.

    Rows of dY and values are counted once, although programs of several columns or outputs read them: those programs run at the same time,
    and the L2 cache serves them.
    """
    rows, outputs = as_matrix(dy).shape
    grid = Grid(rows, columns, *values.shape[1:])
    plan = plan_of(grid, outputs, (EXACT_CONFIGS if is_exact(dy.dtype) else TENSOR_CONFIGS)[0])
    slot_map_bytes = 4 * (2 * grid.down * grid.across + 2 * index.numel())  # filled, read; index read, slots set
    lists = 2 * 4 * plan.groups * (grid.down * (1 + plan.group) + plan.segments)  # written, read
    sums = 4 * outputs * columns * (2 * plan.segments + 1 if plan.segments > 1 else 1)
    return launch.nbytes(values, dy) + slot_map_bytes + lists + sums
