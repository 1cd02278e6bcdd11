"""Can 32-bit arithmetic of a kernel overflow on its way to an address? Read off Triton's intermediate code; nothing is run.

Every integer of the code gets a range, as large as it can become when the launch grows until its largest tensor has 2^32 elements:
program numbers grow with one axis of the grid, and so do arguments of 2^20 and more, which count elements; smaller ones (channels,
widths, tiles) keep their value. An operation whose exact result leaves its type has overflowed, and so has whatever is computed from it; if
that is the offset of a pointer, it is reported. Some things are taken on trust: integers loaded from memory, such as numbers of blocks, are
below 2^24 in size; so is what a kernel itself casts to fewer bits, such as the place within a tile, and it is not negative; nor is what is
divided or compared as unsigned.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

ELEMENTS = 2**32
COUNTS = 2**20
SMALL = 2**24
GRID_LIMIT = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # CUDA's

MOVED = {"splat", "expand_dims", "broadcast", "reshape", "trans", "gather", "split", "extsi", "index_cast"}
RESULT = re.compile(r"^(?P<names>%[\w, %-]+?)(?::(?P<count>\d+))? = (?P<rest>.*)$")
OPERAND = re.compile(r"%[\w-]+(?:#\d+)?")


class Range(NamedTuple):
    """An integer from low to high. overflow: the operation that may have wrapped around on the way to it."""

    low: int
    high: int
    overflow: str = ""


def overflows(code: str, arguments: Sequence[Any], grid: Sequence[int]) -> list[str]:
    """Operations in the TTIR of a kernel that may overflow and reach an address. arguments: in order, without constants."""
    largest = max((a.numel() for a in arguments if isinstance(a, Tensor)), default=1)
    scale = math.ceil(ELEMENTS / max(largest, 1))
    lines = [re.sub(r"\s+loc\((?:[^()]|\([^()]*\))*\)", "", line).strip() for line in code.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
    values = {}
    for name, value in zip(re.findall(r"(%\w+): ", lines[start]), arguments, strict=True):
        if isinstance(value, int):
            values[name] = Range(value, min(value * scale, 2**31 - 1) if COUNTS <= value < 2**31 else value)
    found: dict[str, None] = {}  # each once, in order
    for axis in range(len(grid)):
        grown = [min(size * scale, GRID_LIMIT[i]) if i == axis else size for i, size in enumerate((*grid, 1, 1)[:3])]
        reader = _Reader(lines, grown, dict(values))
        reader.block(start + 1)
        found |= reader.found
    return list(found)


class _Reader:
    def __init__(self, lines: list[str], grid: list[int], values: dict[str, Range]) -> None:
        self.lines, self.grid, self.values = lines, grid, values
        self.found: dict[str, None] = {}

    def block(self, i: int) -> tuple[int, list[list[Range]]]:
        """Read lines from i to the brace that closes their block: (the line of the brace, what each scf.yield hands out)."""
        yielded = []
        while not self.lines[i].startswith("}"):
            if self.lines[i].startswith("scf.yield"):
                yielded.append([self.of(name) for name in OPERAND.findall(self.lines[i])])
            i = self.statement(i)
        return i, yielded

    def statement(self, i: int) -> int:
        """Read the statement that begins at line i; the line after it."""
        match = RESULT.match(self.lines[i])
        rest, names = (match["rest"], _names(match)) if match else (self.lines[i], [])
        kind = re.match(r'"?[\w.]*', rest)[0].strip('"')
        if kind == "scf.for":
            return self.loop(i, names, rest)
        if not rest.endswith("{"):
            self.values |= dict.fromkeys(names, self.value(kind, rest))
            return i + 1
        first = i  # regions: the arms of scf.if, the combining function of tt.reduce
        i, yielded = self.block(i + 1)
        while self.lines[i].endswith("{"):
            i, more = self.block(i + 1)
            yielded += more
        if kind == "scf.if":
            self.values |= zip(names, map(_union, zip(*yielded, strict=True)), strict=True)
        else:
            self.values |= dict.fromkeys(names, self.combined(kind, rest, "\n".join(self.lines[first : i + 1])))
        return i + 1

    def loop(self, i: int, names: list[str], rest: str) -> int:
        """scf.for. What it carries from one pass to the next stays in its range, or gains the same in each pass, or can be anything."""
        counter, first, last, step = OPERAND.findall(rest)[:4]
        carried = re.findall(r"(%[\w-]+) = (%[\w-]+(?:#\d+)?)", rest.partition("iter_args(")[2].partition(")")[0])
        types = re.search(r"-> \((.*)\)", rest)
        widest = [_any(_width(word)) for word in types[1].split(", ")] if types else []
        start = [self.of(name) for _, name in carried]
        low, high = self.of(first).low, max(self.of(last).high, self.of(first).low + 1)
        passes = -(-(high - low) // max(self.of(step).low, 1))
        before = dict(self.found)

        def read(ranges: list[Range]) -> tuple[int, list[Range]]:
            self.found = dict(before)
            self.values[counter] = Range(low, high - 1)
            self.values |= zip((name for name, _ in carried), ranges, strict=True)
            end, yielded = self.block(i + 1)
            return end, yielded[0] if carried else []

        end, once = read(start)
        ranges = [_after(passes, a, b) for a, b in zip(start, once, strict=True)]
        while True:
            end, after = read(ranges)
            settled = [
                _union((r, b)) == r or (_gain(r, b) == _gain(a, o) and not b.overflow)
                for a, o, r, b in zip(start, once, ranges, after, strict=True)
            ]
            if all(settled):
                self.values |= zip(names, ranges, strict=True)
                return end + 1
            ranges = [r if s else _union((r, b, w)) for s, r, b, w in zip(settled, ranges, after, widest, strict=True)]

    def value(self, kind: str, rest: str) -> Range:
        """The result of an operation without regions."""
        kind = kind.rpartition(".")[2]
        operands = [self.of(name) for name in OPERAND.findall(rest)]
        width = _width(rest)
        if kind == "addptr" and operands[1].overflow:
            self.found[operands[1].overflow] = None
        if kind == "load":
            return Range(max(_any(width).low, -SMALL), min(_any(width).high, SMALL))
        if kind == "constant":
            numbers = [int(number) for number in re.findall(r"-?\d+", rest.partition(" : ")[0])]
            return Range(min(numbers), max(numbers)) if numbers else Range(0, 1)  # true, false
        if kind == "make_range":
            return Range(int(re.search(r"start = (\d+)", rest)[1]), int(re.search(r"end = (\d+)", rest)[1]) - 1)
        if kind == "get_program_id":
            return Range(0, self.grid["xyz".index(rest.split()[1])] - 1)
        if kind == "cmpi":
            return Range(0, 1)
        if kind in MOVED:
            return operands[0]
        if kind in ("join", "cat", "select"):
            return _union(operands[-2:])
        if kind == "extui" and operands[0].low < 0:
            return Range(0, 2 ** _width(rest.partition(" to ")[0]) - 1, operands[0].overflow)
        if kind == "trunci":
            return Range(*(min(max(end, 0), SMALL) for end in operands[0][:2]), operands[0].overflow)
        if kind in ("divui", "remui", "shrui", "minui", "maxui"):
            operands = [Range(*(max(end, 0) for end in operand[:2]), operand.overflow) for operand in operands]
        return _fit(_exact(kind, operands), width, kind, rest, operands)

    def combined(self, kind: str, rest: str, text: str) -> Range:
        """The result of tt.reduce or tt.scan: of the operand's size, or a sum of as many as lie along the axis."""
        if kind not in ("tt.reduce", "tt.scan"):
            return _any(64)
        operand = self.of(OPERAND.findall(rest)[0])
        if "arith.addi" not in text:
            return operand
        shape = re.findall(r"tensor<((?:\d+x)+)", text)[-2 if kind == "tt.scan" else 0]
        count = int(shape.split("x")[int(re.search(r"axis = (\d+)", text)[1])])
        exact = min(operand.low, operand.low * count), max(operand.high, operand.high * count)
        return _fit(exact, int(re.search(r"addi .*i(\d+)$", text, re.MULTILINE)[1]), "sum", rest, [operand])

    def of(self, name: str) -> Range:
        return self.values.get(name, _any(64))


def _names(match: re.Match) -> list[str]:
    names = match["names"]
    return [f"{names}#{i}" for i in range(int(match["count"]))] if match["count"] else names.split(", ")


def _gain(before: Range, after: Range) -> tuple[int, int]:
    """What one pass of a loop adds at most, at either end."""
    return min(after.low - before.low, 0), max(after.high - before.high, 0)


def _after(passes: int, before: Range, after: Range) -> Range:
    """After so many passes that gain what the first did."""
    down, up = _gain(before, after)
    return Range(before.low + passes * down, before.high + passes * up, after.overflow)


def _width(types: str) -> int:
    """Bits of the last integer type of a text; 64 where there is none, as of pointers and floats, which are not followed."""
    widths = re.findall(r"(?<![\w%])(?:[\dx]+x)?i(\d+)\b", types)
    return int(widths[-1]) if widths else 64


def _any(width: int) -> Range:
    return Range(-(2 ** (width - 1)), 2 ** (width - 1) - 1)


def _union(ranges: Iterable[Range]) -> Range:
    low, high, overflow = zip(*ranges, strict=True)
    return Range(min(low), max(high), next(filter(None, overflow), ""))


def _fit(exact: tuple[int, int] | None, width: int, kind: str, text: str, operands: list[Range]) -> Range:
    """An exact result in `width` bits; None stands for anything."""
    overflow = next((operand.overflow for operand in operands if operand.overflow), "")
    every = _any(width)
    if exact is None:
        return every._replace(overflow=overflow)
    if every.low <= exact[0] and exact[1] <= every.high:
        return Range(*exact, overflow)
    return every._replace(overflow=overflow or f"{kind} in {width} bits gives up to {max(exact, key=abs)}: {text}")


def _exact(kind: str, operands: list[Range]) -> tuple[int, int] | None:
    """The range of an operation's result if no type limited it; None for operations that are not followed."""
    if len(operands) == 1:
        return operands[0][:2] if kind == "extui" else None
    if len(operands) != 2:
        return None
    a, b = operands
    natural, shift = a.low >= 0 and b.low >= 0, 0 <= b.low <= b.high < 64
    ends = [(x, y) for x in a[:2] for y in b[:2]]
    match kind:
        case "addi":
            return a.low + b.low, a.high + b.high
        case "subi":
            return a.low - b.high, a.high - b.low
        case "muli":
            return min(x * y for x, y in ends), max(x * y for x, y in ends)
        case "shli" if shift:
            return min(x << y for x, y in ends), max(x << y for x, y in ends)
        case "shrsi" | "shrui" if shift:
            return min(x >> y for x, y in ends), max(x >> y for x, y in ends)
        case "divsi" | "divui" if b.low > 0:
            quotients = [abs(x) // y * (1 if x >= 0 else -1) for x, y in ends]  # towards zero
            return min(quotients), max(quotients)
        case "remsi" | "remui" if b.low > 0:
            return max(min(a.low, 0), 1 - b.high), min(max(a.high, 0), b.high - 1)
        case "andi" if a.low >= 0 or b.low >= 0:
            return 0, min(x.high for x in operands if x.low >= 0)
        case "ori" | "xori" if natural:
            return 0, 2 ** max(a.high, b.high).bit_length() - 1
        case "minsi" | "minui":
            return min(a.low, b.low), min(a.high, b.high)
        case "maxsi" | "maxui":
            return max(a.low, b.low), max(a.high, b.high)
    return None
