"""The stream pipeline: worker processes decode and augment images on the host, for data sets or recipes that need it.

timm makes the transforms and moves the batches: workers hand over uint8, the device normalises and erases. The sampler
hands out (epoch, index) pairs, so a sample knows its own seed and workers can stay alive between epochs.
Shapes: x float32 [B, 3, S, S], y int64 [B], both on the device.
"""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .augment import Augment, mix, seeded
from .files import ABOUT, ImageError, Notes
from .sources import Images


class StreamLoader:
    """Iterates (x, y) on `device`. Training shuffles, augments and drops the last incomplete batch; testing does not."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        augment: Augment,
        image_size: int,
        crop_pct: float,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        seed: int,
        train: bool,
        workers: int,
    ) -> None:
        self.seed = seed
        if train:
            transform = _train_transform(augment, image_size, tuple(mean))
        else:
            transform = _test_transform(augment, image_size, crop_pct)
        self.batches = _Batches(len(images), batch_size, seed, train)
        loader = torch.utils.data.DataLoader(
            _Samples(images, transform, seed),
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or the loader would draw its worker seed from the global stream
        )
        self.loader = PrefetchLoader(_Noting(loader, images), mean=tuple(mean), std=tuple(std), device=device)
        erasing = augment.random_erasing if train else None
        self.erase = RandomErasing(erasing, device=device) if erasing else None

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`: its order and augmentation depend on it and on the run seed alone."""
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.batches.epoch
        for step, (x_BCHW, y_B) in enumerate(self.loader):
            if self.erase is not None:
                with seeded(self.seed, epoch, step, 1):  # four parts: never the seed of a sample, which has three
                    x_BCHW = self.erase(x_BCHW)
            yield x_BCHW, y_B


class _Batches:
    """Lists of (epoch, index); in training a fresh order every epoch."""

    def __init__(self, count: int, batch_size: int, seed: int, train: bool) -> None:
        self.count, self.batch_size, self.seed, self.train = count, batch_size, seed, train
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole if self.train or not rest else whole + 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.count)
        if self.train:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        for step in range(len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chosen.tolist()]


class _Samples(torch.utils.data.Dataset):
    """(epoch, index) -> (transformed uint8 image [3, S, S], label, (index, notes on the file)), under the sample's own seed."""

    def __init__(self, images: Images, transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, tuple[int, tuple[str, ...]]]:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            image, notes = self.images.read(index)
            return self.transform(image), int(self.images.labels[index]), (index, notes)


def _collate(samples: list[tuple]) -> tuple[Tensor, Tensor, list[tuple[int, tuple[str, ...]]]]:
    """A batch, and (index, notes) of the files that have notes."""
    x_BCHW, y_B = fast_collate([(image, label) for image, label, _ in samples])
    return x_BCHW, y_B, [about for *_, about in samples if about[1]]


class _Noting:
    """The batches of a loader. The notes of its workers on files become one warning with counts at the end of a pass."""

    def __init__(self, loader: torch.utils.data.DataLoader, images: Images) -> None:
        self.loader, self.images = loader, images
        self.notes = Notes()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        unreadable = None
        try:
            for x_BCHW, y_B, about in self.loader:
                for index, kinds in about:
                    for kind in kinds:
                        self.notes.add(kind, self.images.path(index))
                yield x_BCHW, y_B
        except ImageError as error:  # a worker's text is a traceback, the name of the class, the message
            unreadable = str(error).rpartition(f"{ImageError.__module__}.{ImageError.__qualname__}: ")[2].strip()
            error.__traceback__ = None  # torch's refers to itself and to the workers, which would then be stopped late
        if unreadable:
            raise ImageError(unreadable)
        self.notes.warn(ABOUT)


def _train_transform(augment: Augment, image_size: int, mean: tuple[float, ...]):
    """timm's training transform; without a resized crop, its first stage is replaced by resize, padded crop and flip."""
    first, second, last = create_transform(
        image_size,
        is_training=True,
        hflip=0.5 if augment.flip else 0.0,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        use_prefetcher=True,
        separate=True,
    )
    for policy in second.transforms:
        _allow_zero_bits(policy)
    if not augment.random_resized_crop:
        how = (
            InterpolationMode.BILINEAR
            if augment.interpolation == "random"
            else InterpolationMode(augment.interpolation)
        )
        steps = [transforms.Resize(image_size, interpolation=how), transforms.CenterCrop(image_size)]
        if augment.crop_padding:
            mode = "constant" if augment.padding_mode == "zero" else "reflect"
            steps.append(transforms.RandomCrop(image_size, padding=augment.crop_padding, padding_mode=mode))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        first = transforms.Compose(steps)
    return transforms.Compose([first, second, last])


def _allow_zero_bits(policy) -> None:
    """Replace posterize of a timm policy (RandAugment, AutoAugment, AugMix) by the one below, in place; other transforms have none."""
    lists = (getattr(policy, "ops", ()), *getattr(policy, "policy", ()))
    for operation in (operation for operations in lists for operation in operations):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused) -> Image.Image:
    """timm's posterize, which asks Pillow for 0 bits at full strength: black up to Pillow 12, an error from 13 on."""
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda value: 0)


def _test_transform(augment: Augment, image_size: int, crop_pct: float):
    return create_transform(
        image_size,
        is_training=False,
        interpolation="bilinear" if augment.interpolation == "random" else augment.interpolation,
        crop_pct=crop_pct,
        use_prefetcher=True,
    )
