"""Block-sparse pruning of a matrix of activations, in plain PyTorch: encoding, decoding, and the weight gradient from the kept blocks.

    x [R, C]   is padded with zeros to whole blocks of bh x bw: a grid of n = ceil(R / bh) * ceil(C / bw) blocks
    score      = sum |x| over the block / (bh * bw), the mean |x|; padding counts as zeros
    kept       = the K blocks with the highest scores: values [K, bh, bw] in x's dtype, and the position of each in the grid, int32 [K],
                 counted in row-major order
    dW         = sum over kept blocks of dY[rows of the block]^T @ block, added to the columns of the block: 2 * O * bh * bw operations
                 per block, K / n of the dense product

The score is the L1 norm of the block up to a constant. So the K highest scores hold the largest part of sum |x| that K blocks can hold.
A block larger than the matrix shrinks to it: blocks of 1 x F keep whole rows of any matrix of at most F columns. K depends on the shape
alone. So the number of bytes is fixed, and no operation waits for the device.

select="topk" keeps the blocks with the highest scores unchanged. dW is biased towards small norms.

select="sample" is unbiased. Block b is kept with probability p_b = min(1, c * score_b), with c such that sum p_b = K, and its values are
divided by p_b. Systematic sampling draws exactly K blocks: the p_b are laid end to end on [0, K], u is uniform in [0, 1), and the blocks
that contain u, u + 1, ..., u + K - 1 are kept. Values beyond their dtype's finite range, 65504 in fp16, become its largest number.

Bytes: K * (bh * bw * itemsize + 4). The int32 positions add 4 / (bh * bw * itemsize), 1.56% for 8x8 in fp32.

Source: arXiv 2311.16883 (magnitude criterion, block-sparse format). Its kernels were not available; scores, selection and sampling are
our choices. Shapes: x_RC rows and columns, dy_RO output features, n blocks, K kept blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.rounding import saturated

SELECT = ("topk", "sample")
CHUNK = 2**20  # elements of the temporaries of weight_grad_reference; a single group of blocks may need more


class Grid(NamedTuple):
    """The partition of a matrix [rows, columns] into blocks [height, width]. The last blocks may reach beyond the edge."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def down(self) -> int:
        """Blocks along the rows."""
        return -(-self.rows // self.height)

    @property
    def across(self) -> int:
        """Blocks along the columns."""
        return -(-self.columns // self.width)


class Blocks(NamedTuple):
    """What is saved of x_RC. Positions ascend."""

    values: Tensor  # x's dtype [K, bh, bw]
    index: Tensor  # int32 [K], row of blocks * grid.across + column of blocks


def block_grid(shape: torch.Size, block: tuple[int, int]) -> Grid:
    """The grid of a tensor [..., C] viewed as a matrix [R, C]. The grid of an empty tensor has no blocks."""
    rows, columns = shape[:-1].numel(), shape[-1]
    return Grid(rows, columns, max(min(block[0], rows), 1), max(min(block[1], columns), 1))


def kept_blocks(grid: Grid, sparsity: float) -> int:
    """K: the integer nearest to (1 - sparsity) * n; at least 1 if the grid has a block."""
    blocks = grid.down * grid.across
    return min(max(1, int((1 - sparsity) * blocks + 0.5)), blocks)


def code_bytes(grid: Grid, sparsity: float, itemsize: int) -> int:
    """Bytes of the Blocks of a matrix with this grid, for elements of `itemsize` bytes."""
    return kept_blocks(grid, sparsity) * (grid.height * grid.width * itemsize + 4)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., C] as a matrix [R, C]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def block_scores_reference(x_RC: Tensor, grid: Grid) -> Tensor:
    """Mean |x| of each block, padding counted as zeros: fp32 (fp64 for fp64) [n], in row-major order."""
    return _scores(_cut(x_RC, grid))


def topk_reference(scores: Tensor, kept: int) -> Tensor:
    """Positions of the `kept` highest scores [n], ascending, int64 [kept]. Among equals the first are taken; NaN counts as highest."""
    return scores.sort(descending=True, stable=True).indices[:kept].sort().values


def inclusion_reference(scores: Tensor, kept: int) -> Tensor:
    """Probability with which each block is kept, fp64 [n]: min(1, c * score), summing to `kept`.

    c is found by water-filling: the highest scores are capped at 1 one after the other, until c * score is at most 1 for the rest.
    If fewer than `kept` scores are above zero, the blocks with score zero share the remaining probability evenly. A score that is not
    finite is kept with probability 1 or makes all probabilities NaN, so that the gradient shows it.
    """
    count = scores.numel()
    ranked, order = scores.double().where(scores.isfinite(), torch.nan).sort(descending=True, stable=True)
    rest = ranked.flip(0).cumsum(0).flip(0)  # of this score and all below
    left = kept - torch.arange(count, dtype=torch.float64, device=scores.device)  # places, once those above are taken
    capped = (left * ranked > rest).sum().clamp(max=kept - 1)[None]
    places, total = left.gather(0, capped), rest.gather(0, capped)
    shares = torch.where(total == 0, places / (count - capped), ranked * places / total)
    ranks = torch.arange(count, device=scores.device)
    ranked_p = torch.where(ranks < capped, 1.0, shares.clamp(max=1.0))
    return torch.empty_like(ranked_p).scatter_(0, order, ranked_p)


def sample_reference(probability: Tensor, kept: int, noise: Tensor) -> Tensor:
    """Systematic sampling: probability fp64 [n] summing to `kept`, noise u in [0, 1) [1] -> ascending positions, int64 [kept]."""
    ranks = torch.arange(kept, device=probability.device)
    index = torch.searchsorted(probability.cumsum(0), ranks + noise.double(), right=True)
    # Rounding of the running sum may hit a block twice or miss the last: each position is at least one above the one before.
    index = (index - ranks).cummax(0).values + ranks
    return torch.minimum(index, probability.numel() - kept + ranks)


def select_reference(scores: Tensor, kept: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Selects `kept` blocks: ascending positions, int64 [kept], and for a sample the factors 1 / p in scores' dtype [kept].

    Without noise the blocks with the highest scores are selected, and there are no factors (None). noise [1] in [0, 1) asks for a sample.
    """
    if noise is None or kept == scores.numel():
        return topk_reference(scores, kept), None
    probability = inclusion_reference(scores, kept)
    index = sample_reference(probability, kept, noise)
    p = probability[index]
    return index, torch.where(p == 0, 0.0, 1 / p).to(scores.dtype)  # p = 0: a block of zeros


def take_reference(x_RC: Tensor, grid: Grid, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """The blocks of x_RC at positions [K], padded with zeros, each times its weight [K], if given -> [K, bh, bw] in x's dtype."""
    return _take(_cut(x_RC, grid), index.long(), weight)


def encode_reference(x_RC: Tensor, grid: Grid, kept: int, noise: Tensor | None = None) -> Blocks:
    """x_RC (fp64, fp32, fp16 or bf16, any strides) -> its `kept` blocks: highest scores, or a sample, given noise [1] in [0, 1).

    Temporary memory: one padded copy of x_RC where blocks do not divide it, sorting space for the n scores.
    """
    blocks = _cut(x_RC, grid)
    index, weight = select_reference(_scores(blocks), kept, noise)
    return Blocks(_take(blocks, index, weight), index.to(torch.int32))


def decode_reference(blocks: Blocks, grid: Grid) -> Tensor:
    """Blocks -> x~ [R, C], zero where no block is kept."""
    dense = blocks.values.new_zeros(grid.down * grid.across, grid.height, grid.width)
    dense[blocks.index.long()] = blocks.values
    dense = dense.view(grid.down, grid.across, grid.height, grid.width).transpose(1, 2)
    return dense.reshape(grid.down * grid.height, grid.across * grid.width)[: grid.rows, : grid.columns]


def weight_grad_reference(blocks: Blocks, dy_RO: Tensor, grid: Grid) -> Tensor:
    """dW = dY^T x~ [O, C] from the kept blocks, without the dense x~. fp32 sums and result, fp64 for fp64.

    Kept blocks of one block column are stacked `group` high, the last group of a column filled up with zeros, and each group is
    multiplied with the rows of dY it meets: at most 1/8 more operations than the kept blocks need. Groups are taken a few at a time,
    so that the gathered rows of dY and the products stay below CHUNK elements.
    """
    (kept, height, width), outputs = blocks.values.shape, dy_RO.shape[1]
    device, dtype = dy_RO.device, compute_dtype(dy_RO.dtype)
    if kept == 0 or outputs == 0:
        return dy_RO.new_zeros(outputs, grid.columns, dtype=dtype)
    group = max(1, kept // (8 * grid.across))
    groups = (kept + grid.across * (group - 1)) // group  # the most there can be; some may stay empty
    index = blocks.index.long()
    column, order = (index % grid.across).sort(stable=True)
    # Rows past the edge meet zeros in the block; the last row stands in for them.
    rows = (index // grid.across * height)[order, None] + torch.arange(height, device=device)
    rows = rows.clamp_(max=grid.rows - 1)  # [K, bh]
    in_column = torch.zeros(grid.across, dtype=torch.long, device=device).index_add_(0, column, torch.ones_like(column))
    ends = ((in_column + group - 1) // group).cumsum(0)  # group at which each column ends
    rank = torch.arange(kept, device=device) - (in_column.cumsum(0) - in_column)[column]  # within the column
    slot = (ends - (in_column + group - 1) // group)[column] * group + rank
    values = blocks.values.new_zeros(groups * group, height, width).index_copy_(0, slot, blocks.values[order])
    values = values.view(groups, group * height, width)
    rows = rows.new_zeros(groups * group, height).index_copy_(0, slot, rows).view(groups, group * height)
    column = torch.searchsorted(ends, torch.arange(groups, device=device), right=True).clamp(max=grid.across - 1)
    dw = dy_RO.new_zeros(grid.across, width, outputs, dtype=dtype)
    step = max(1, CHUNK // ((group * height + width) * outputs))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        dw.index_add_(0, column[part], values[part].to(dtype).mT @ dy_RO[rows[part]].to(dtype))
    return dw.view(-1, outputs)[: grid.columns].T.contiguous()


def _cut(x_RC: Tensor, grid: Grid) -> Tensor:
    """x_RC padded with zeros to whole blocks, [down, bh, across, bw]; a view where nothing has to be padded."""
    below, beside = grid.down * grid.height - grid.rows, grid.across * grid.width - grid.columns
    padded = F.pad(x_RC, (0, beside, 0, below)) if below or beside else x_RC
    return padded.unflatten(0, (grid.down, grid.height)).unflatten(2, (grid.across, grid.width))


def _take(blocks: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """The blocks of [down, bh, across, bw] at int64 positions [K], times weight [K] -> [K, bh, bw]."""
    taken = blocks.transpose(1, 2)[index // blocks.shape[2], index % blocks.shape[2]]
    if weight is None:
        return taken
    product = taken * weight[:, None, None]
    return torch.where(taken.isfinite(), saturated(product.clone(), taken.dtype), product.to(taken.dtype))


def _scores(blocks: Tensor) -> Tensor:
    """|x| summed over each block of [down, bh, across, bw] over its size, [n]."""
    norm = torch.linalg.vector_norm(blocks, ord=1, dim=(1, 3), dtype=compute_dtype(blocks.dtype))
    return (norm / (blocks.shape[1] * blocks.shape[3])).reshape(-1)
