"""Seeds on the device for kernels that make their own noise: a draw needs no launch, and each replay of a CUDA graph has new seeds.

Draw d of a stream of noise has the seed (seed + d * STEP) mod 2^63, on the host and on a device. A Bank holds the seeds of COUNT draws and
hands out views. It is refilled in halves: when draws reach the middle of one half, the other half, which is used up, is advanced by an
addition on the device. So a seed is valid from COUNT / 4 draws before its own to COUNT / 4 draws after it, for every CUDA stream.

A CUDA graph replays launches with the arguments they were captured with. So a captured draw first adds 1 to its seed, on the device, and
the addition is replayed too. Each draw has its own addition, since parts of a step may be captured separately and replayed unequally
often. `Bank.added` reads the sum of these additions from the device when the position in the stream is saved.

Code that reads a seed after the forward pass that drew it must keep a clone: the content of the view changes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

STEP = 0x9E3779B97F4A7C15
COUNT = 4096  # draws of about forty steps of a ResNet-50
HALF, QUARTER = COUNT // 2, COUNT // 4
_LARGEST = 2**63 - 1
_MOVE = COUNT * STEP % 2**63  # from a draw's seed to that of the draw that replaces it


def seed_of(seed: int, draw: int) -> int:
    """The seed of a draw, counted from 1, in the stream `seed`: 0 <= seed < 2^63."""
    return (seed + draw * STEP) % 2**63


def banked(x: Tensor) -> bool:
    """Whether seeds for x come from a Bank. References on the CPU take numbers of the host; fake tensors hold no seeds."""
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter)


def capturing(device: torch.device) -> bool:
    """Whether launches on the device are being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Bank:
    """The seeds of one stream of noise on one device, in two halves; the current draw lies between their middles.

    draw: the next draw. added: the result of `added` of the bank that this one resumes.
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
        """How often each captured draw was replayed: place in the bank -> count. Waits for the device if there are any."""
        if not self._captured:
            return {}
        more = (self._seeds.cpu() - _seeds(self._seed, self._turn)) & _LARGEST
        return {place: int(more[place]) for place in more.nonzero().flatten().tolist()}

    def move_to(self, seed: int, draw: int, added: Mapping[int, int]) -> None:
        """Resume at another position. Captured graphs stay valid."""
        self._seed, self._turn = seed, _turn(draw)
        self._captured |= bool(added)
        seeds = _seeds(seed, self._turn)
        for place, more in added.items():
            seeds[place] += more
        self._seeds.copy_(seeds)

    def _go_on(self, draw: int, turn: int, captured: bool) -> None:
        if captured:  # in a graph each replay would advance the bank; the next draw outside of a graph advances it
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
    """The number of middles of halves before a draw."""
    return (draw + QUARTER) // HALF


def _seeds(seed: int, turn: int) -> Tensor:
    """Seeds of the draws of halves turn - 1 and turn: int64 [COUNT], the seed of draw d at d % COUNT."""
    draws = np.arange((turn - 1) * HALF, (turn + 1) * HALF).astype(np.uint64)
    seeds = (np.uint64(seed) + draws * np.uint64(STEP)) & np.uint64(_LARGEST)
    return torch.from_numpy(np.roll(seeds, (turn - 1) % 2 * HALF).astype(np.int64))
