"""The resident pipeline: the whole data set is on the device as uint8; an epoch needs no work of the host.

Order, crops and mirroring of an epoch are drawn at its start by a generator on the device, seeded from (run seed,
epoch); each batch is then two gathers and a normalisation. Images that will be cropped are stored with their padding.
Shapes: N images, B batch, S image side, P = S + 2 * padding; x float32 [B, 3, S, S], y int64 [B].
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .augment import Augment, mix
from .sources import Images


class ResidentLoader:
    """Iterates (x, y) on `device`. Training shuffles, augments and drops the last incomplete batch; testing does not."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        augment: Augment,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        seed: int,
        train: bool,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.train = train
        self.epoch = 0
        self.flip = train and augment.flip
        self.padding = augment.crop_padding if train else 0
        self.side = images.size[0]
        pixels_NCHW = _pad(images.pixels(), self.padding, augment.padding_mode)
        self.pixels = pixels_NCHW.to(device)
        self.labels = images.labels.to(device)
        self.mean = torch.tensor([255 * value for value in mean], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([255 * value for value in std], device=device).view(1, 3, 1, 1)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`: its order and augmentation depend on it and on the run seed alone."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.train or not rest else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.labels), self.labels.device
        if not self.train:
            for start in range(0, count, self.batch_size):
                batch = slice(start, start + self.batch_size)
                yield self._normalise(self.pixels[batch]), self.labels[batch]
            return
        generator = torch.Generator(device).manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(count, generator=generator, device=device)
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator, device=device)
        mirrored = torch.rand(count, generator=generator, device=device) < (0.5 if self.flip else 0.0)
        for step in range(len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            chosen = order[batch]
            pixels_BCHW = self.pixels[chosen]
            if self.padding or self.flip:
                pixels_BCHW = _window(pixels_BCHW, offsets[0, batch], offsets[1, batch], mirrored[batch], self.side)
            yield self._normalise(pixels_BCHW), self.labels[chosen]

    def _normalise(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.float().sub_(self.mean).div_(self.std)


def _pad(pixels_NCHW: Tensor, padding: int, mode: str) -> Tensor:
    """A border of `padding` pixels: zeros, or the image mirrored without its edge (numpy: torch cannot reflect uint8)."""
    if padding == 0:
        return pixels_NCHW
    border = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(pixels_NCHW.numpy(), border, mode="constant" if mode == "zero" else "reflect")
    return torch.from_numpy(padded)


def _window(pixels_BCPP: Tensor, top_B: Tensor, left_B: Tensor, mirrored_B: Tensor, side: int) -> Tensor:
    """Crop [B, C, P, P] to [B, C, side, side] at (top, left); mirror left-right where mirrored_B is true."""
    count, channels, _, width = pixels_BCPP.shape
    along = torch.arange(side, device=pixels_BCPP.device)
    rows_BS = top_B[:, None] + along
    columns_BS = left_B[:, None] + torch.where(mirrored_B[:, None], along.flip(0), along)
    flat = (rows_BS[:, :, None] * width + columns_BS[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
    return pixels_BCPP.flatten(2).gather(2, flat).view(count, channels, side, side)
