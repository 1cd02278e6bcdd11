"""Seeds for kernels that make their own noise, ready on the device: no launch a draw, and new ones in each replay of a CUDA graph.

Draw d of a stream of noise has the seed (seed + d * STEP) mod 2^63, on the host as on a device. A Bank holds those of COUNT draws and hands
out views. It is used in halves: when draws are in the middle of one, the other, which is used up, moves on by an addition on the device. A
seed is then there for COUNT / 4 draws before its own and as many after it, whichever stream reads it.

A CUDA graph replays launches with the arguments they were captured with. So a draw that is captured adds 1 to its seed first, on the
device, and the addition is replayed too. Each draw has its own, since a step may be captured in parts that are not replayed equally often.
What replays added is read from the device (`Bank.added`) when the position in the stream is saved.

Whoever reads a seed after the forward pass that drew it keeps a clone: the view's content moves on.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

STEP = 0x9E3779B97F4A7C15
COUNT = 4096  # draws of about forty steps of a ResNet-50
HALF, QUARTER = COUNT // 2, COUNT // 4
_LARGEST = 2**63 - 1
_MOVE = COUNT * STEP % 2**63  # from a draw's seed to that of the draw which takes its place


def seed_of(seed: int, draw: int) -> int:
    """The seed of a draw, counted from 1, in the stream `seed`: 0 <= seed < 2^63."""
    return (seed + draw * STEP) % 2**63


def banked(x: Tensor) -> bool:
    """Whether the seeds for x come from a Bank. Those of the CPU's references are numbers of the host; fake tensors hold none."""
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter)


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Bank:
    """The seeds of one stream of noise on one device: of two halves, between whose middles draws are.

    draw: the next one. added: what `added` returned of the bank that this one goes on from.
    """

    def __init__(self, seed: int, draw: int, device: torch.device, added: Mapping[int, int] | None = None):
        if capturing(device):
            raise RuntimeError(
                "actpress: noise is drawn for the first time while a CUDA graph is captured; run a training step before"
            )
        self._seeds = torch.empty(COUNT, dtype=torch.int64, device=device)
        self._views = self._seeds.split(1)
        self._captured = False
        self.move_to(seed, draw, added or {})

    def draw(self, draw: int) -> Tensor:
        """The seed of a draw, a view of int64 [1], not negative. Raises RuntimeError where more than QUARTER draws are captured at once."""
        turn, captured = _turn(draw), capturing(self._seeds.device)
        if turn != self._turn:
            self._go_on(draw, turn, captured)
        view = self._views[draw % COUNT]
        if captured:
            self._captured = True
            view.add_(1)
        return view

    def added(self) -> dict[int, int]:
        """What captured draws added: place in the bank -> how often. Waits for the device if there are any."""
        if not self._captured:
            return {}
        more = (self._seeds.cpu() - _seeds(self._seed, self._turn)) & _LARGEST
        return {place: int(more[place]) for place in more.nonzero().flatten().tolist()}

    def move_to(self, seed: int, draw: int, added: Mapping[int, int]) -> None:
        """Go on from another position. Graphs that were captured go on too."""
        self._seed, self._turn = seed, _turn(draw)
        self._captured |= bool(added)
        seeds = _seeds(seed, self._turn)
        for place, more in added.items():
            seeds[place] += more
        self._seeds.copy_(seeds)

    def _go_on(self, draw: int, turn: int, captured: bool) -> None:
        if captured:  # in a graph, the bank would move on in each replay: it does at the next draw that is not captured
            if not self._turn - 1 <= draw // HALF <= self._turn:
                raise RuntimeError(
                    f"actpress: more than {QUARTER} draws of noise in a CUDA graph; capture smaller parts"
                )
        elif turn == self._turn + 1:
            used_up = self._seeds[(self._turn - 1) % 2 * HALF :][:HALF]
            used_up.add_(_MOVE).bitwise_and_(_LARGEST)
            self._turn = turn
        else:
            self.move_to(self._seed, draw, self.added())


def _turn(draw: int) -> int:
    """Counts the middles of halves that come before a draw."""
    return (draw + QUARTER) // HALF


def _seeds(seed: int, turn: int) -> Tensor:
    """Of the draws of halves turn - 1 and turn: int64 [COUNT], that of draw d at d % COUNT."""
    draws = np.arange((turn - 1) * HALF, (turn + 1) * HALF).astype(np.uint64)
    seeds = (np.uint64(seed) + draws * np.uint64(STEP)) & np.uint64(_LARGEST)
    return torch.from_numpy(np.roll(seeds, (turn - 1) % 2 * HALF).astype(np.int64))
