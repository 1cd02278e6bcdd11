"""Will Triton reduce over the right threads? Read off its intermediate code for GPUs (TTGIR); nothing is run.

Triton up to 3.6 takes the lanes of a warp that lie along the axis of a reduction for neighbours, or equally far apart: it shuffles by the
lowest such bit of the lane's number, times 1, 2, 4, ... Where other bits lie between them, it reduces other elements than asked for, and
reads shared memory that nobody wrote. Layouts of one axis of a tile have such bits side by side. A reshape that merges axes may not:
blocks and columns of [maps, blocks, columns], with maps between them. So kernels reduce an axis at a time.
"""

import ast
import re

_REDUCE = re.compile(
    r'"tt\.reduce"\(.*?\) <\{axis = (\d+)[^}]*\}>.*?\}\) : \(tensor<([^)]*?)>(?:, tensor<.*?)?\) ->', re.S
)
_KINDS = {"register": "sizePerThread", "lane": "threadsPerWarp", "warp": "warpsPerCTA"}

# Of a register's, lane's and warp's number, from the lowest on: how far each bit moves along the axes.
Bits = dict[str, list[list[int]]]


def scattered(code: str) -> list[str]:
    """Reductions in the TTGIR of a kernel whose axis lies in bits of the lane's, or warp's, number that are not side by side. Raises
    ValueError for a layout that is neither blocked, linear, nor a slice of those, and where a reduction cannot be read."""
    names = dict(re.findall(r"^(#\w+) = (#ttg\S.*)$", code, re.M))
    reductions, found = list(_REDUCE.finditer(code)), []
    if len(reductions) != code.count('"tt.reduce"'):
        raise ValueError(f"only {len(reductions)} of the reductions in this code can be read")
    for reduction in reductions:
        axis, (size, layout) = int(reduction[1]), reduction[2].split(", ", 1)
        bits = _bits(layout.strip(), [int(n) for n in size.split("x")[:-1]], names)
        for kind in ("lane", "warp"):
            along = [i for i, moves in enumerate(bits[kind]) if moves[axis]]
            if along and along[-1] - along[0] >= len(along):
                found.append(f"axis {axis} of {size}: bits {along} of the {kind}")
    return found


def _bits(layout: str, shape: list[int], names: dict[str, str]) -> Bits:
    layout = names.get(layout, layout)
    if layout.startswith("#ttg.slice"):
        dim, parent = re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout).groups()
        cut = int(dim)
        bits = _bits(parent, [*shape[:cut], 1, *shape[cut:]], names)
        return {kind: [moves[:cut] + moves[cut + 1 :] for moves in all_moves] for kind, all_moves in bits.items()}
    if layout.startswith("#ttg.linear"):
        return {kind: ast.literal_eval(re.search(rf"{kind} = (\[.*?\]), \w+ = ", layout)[1]) for kind in _KINDS}
    if layout.startswith("#ttg.blocked"):
        return _blocked(layout, shape)
    raise ValueError(f"layout {layout}; allowed: blocked, linear, slice")


def _blocked(layout: str, shape: list[int]) -> Bits:
    fields = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+) = (\[[^\]]*\])", layout)}
    bits, size = {}, [1] * len(shape)
    for kind, field in _KINDS.items():
        bits[kind] = []
        for axis in fields["order"]:
            for _ in range(fields[field][axis].bit_length() - 1):
                # past the tensor's size, threads hold the same
                bits[kind].append([size[axis] if d == axis and size[axis] < shape[d] else 0 for d in range(len(shape))])
                size[axis] *= 2
    return bits
