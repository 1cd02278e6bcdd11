"""What a recipe does to a training image, and the random streams that make it repeatable.

Everything drawn for one sample of one epoch comes from a seed made of (run seed, epoch, sample), never from the
process's global state. An epoch therefore replays bit for bit after a resume and whatever the number of workers.
"""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

PADDING_MODES = ("zero", "reflect")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "random")
AUTO_AUGMENTS = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


@dataclass(frozen=True)
class Augment:
    """The `augment` fields of a recipe. Training: crop or resized crop, flip, the rest; evaluation: resize and crop.

    crop_padding          pixels added on every side before a random crop back to the image size; 0 = no crop
    padding_mode          what the added pixels hold: zero (black before normalisation) or reflect
    flip                  mirror left-right with probability 1/2
    random_resized_crop   crop 8-100% of the area at aspect 3/4 to 4/3 and resize to the image size
    auto_augment          a timm policy string, e.g. rand-m9-mstd0.5-inc1
    color_jitter          strength of brightness, contrast and saturation; timm leaves it out beside auto_augment
    random_erasing        probability of erasing one rectangle to the mean
    interpolation         for every resize; evaluation takes bilinear in place of random
    crop_pct              evaluation: resize the shorter edge to image_size / crop_pct and crop the centre;
                          null = 0.875 for imagenet, 1 elsewhere
    """

    crop_padding: int = 0
    padding_mode: str = "zero"
    flip: bool = False
    random_resized_crop: bool = False
    auto_augment: str | None = None
    color_jitter: float | None = None
    random_erasing: float | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "random_resized_crop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"augment.{name} is {getattr(self, name)!r}; allowed: true, false")
        if not isinstance(self.crop_padding, int) or isinstance(self.crop_padding, bool) or self.crop_padding < 0:
            raise ValueError(f"augment.crop_padding is {self.crop_padding!r}; allowed: integers from 0")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"augment.padding_mode is {self.padding_mode!r}; allowed: {', '.join(PADDING_MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"augment.interpolation is {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        if self.random_resized_crop and self.crop_padding:
            raise ValueError(
                f"augment.crop_padding is {self.crop_padding} beside random_resized_crop; allowed: 0 there"
            )
        if self.auto_augment and str(self.auto_augment).split("-")[0] not in AUTO_AUGMENTS:
            allowed = ", ".join(AUTO_AUGMENTS)
            raise ValueError(
                f"augment.auto_augment is {self.auto_augment!r}; allowed: strings that start with {allowed}"
            )
        if self.color_jitter is not None and not (is_number(self.color_jitter) and self.color_jitter >= 0):
            raise ValueError(f"augment.color_jitter is {self.color_jitter}; allowed: numbers from 0, or null")
        if self.random_erasing is not None and not (is_number(self.random_erasing) and 0 <= self.random_erasing <= 1):
            raise ValueError(f"augment.random_erasing is {self.random_erasing}; allowed: 0 to 1, or null")
        if self.crop_pct is not None and not (is_number(self.crop_pct) and 0 < self.crop_pct <= 1):
            raise ValueError(f"augment.crop_pct is {self.crop_pct}; allowed: above 0 and up to 1, or null")

    @classmethod
    def read(cls, node: Mapping[str, Any]) -> "Augment":
        """The augmentation of a config node. Raises ValueError for a node that is no group, and for unknown fields."""
        allowed = [field.name for field in fields(cls)]
        if not isinstance(node, Mapping):
            raise ValueError(f"recipe.augment is {node!r}; allowed: a group of {', '.join(allowed)}")
        unknown = sorted(set(node) - set(allowed))
        if unknown:
            raise ValueError(f"augment.{unknown[0]} is unknown; allowed: {', '.join(allowed)}")
        return cls(**node)

    def host_only(self) -> list[str]:
        """The fields in use that only the stream pipeline offers, since they need decoded images on the host."""
        names = ("random_resized_crop", "auto_augment", "color_jitter", "random_erasing")
        found = [name for name in names if getattr(self, name)]
        return found + (["crop_pct"] if self.crop_pct not in (None, 1) else [])


def is_number(value: Any) -> bool:
    """Whether value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mix(*parts: int) -> int:
    """One 63-bit seed from several non-negative integers; unrelated for any two different lists."""
    counted = (len(parts), *parts)  # SeedSequence pads with zeros, so that (1,) and (1, 0) would be alike
    return int(np.random.SeedSequence(counted).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seed the CPU generators of python, numpy and torch by `mix(*parts)` inside the block, and restore their states after it.

    These are the global generators, since timm's and torchvision's transforms draw from them.
    """
    seed = mix(*parts)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
