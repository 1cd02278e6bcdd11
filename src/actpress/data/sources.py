"""Where the images come from: torchvision's archives, a folder of image files, or a set that ships with a package.

`load` returns the train and the test images of a dataset as `ArrayImages` (one uint8 tensor) or `FileImages` (files
decoded when asked for). Both offer: len, size (height, width), formats (of the files), labels int64 [N],
pixels() -> uint8 [N, 3, H, W], pil(i) -> RGB image, subset(indices).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader
from torch import Tensor

SOURCES = {
    "cifar10": ("torchvision", "folder"),
    "cifar100": ("torchvision", "folder"),
    "imagenet": ("folder",),
    "synthetic": ("builtin",),
    "digits": ("builtin",),
}
_ARCHIVES = {  # what torchvision looks for: archive, or the folder it unpacks to
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python"),
}
_TEST_FOLDERS = {"cifar10": ("test",), "cifar100": ("test",), "imagenet": ("val", "validation")}
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


class ArrayImages:
    """Images held as one uint8 tensor [N, 3, H, W] on the CPU, with int64 labels [N]."""

    def __init__(self, pixels_NCHW: Tensor, labels_N: Tensor) -> None:
        self._pixels = pixels_NCHW
        self.labels = labels_N
        self.size = tuple(pixels_NCHW.shape[2:])
        self.formats: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        return self._pixels

    def pil(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index].permute(1, 2, 0).numpy())

    def subset(self, indices: Sequence[int]) -> "ArrayImages":
        chosen = torch.as_tensor(indices)
        return ArrayImages(self._pixels[chosen], self.labels[chosen])


class FileImages:
    """Images read from files through a timm reader, whose `samples` is a list of (path, class index).

    indices picks some of the reader's samples; None means all.
    """

    def __init__(self, reader, indices: Tensor | None = None) -> None:
        self._reader = reader
        self._indices = torch.arange(len(reader)) if indices is None else indices
        self.labels = torch.tensor([target for _, target in reader.samples], dtype=torch.int64)[self._indices]
        suffixes = {os.path.splitext(path)[1].lower() for path, _ in reader.samples}
        self.formats = tuple(sorted({_FORMATS.get(suffix, suffix[1:].upper()) for suffix in suffixes}))
        width, height = self.pil(0).size
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Image.Image:
        """RGB image; ValueError naming the file if it cannot be decoded."""
        file, _ = self._reader[int(self._indices[index])]
        with file:
            try:
                return Image.open(file).convert("RGB")
            except OSError as error:
                raise ValueError(f"{file.name} is not a readable image ({error})") from error

    def pixels(self) -> Tensor:
        """All files decoded, uint8 [N, 3, H, W]; ValueError naming a file of another size than the first.

        One thread: small files spend their time in Python, where 2 or 4 threads were measured to be slower than one.
        """
        pixels_NHWC = np.empty((len(self), *self.size, 3), np.uint8)
        for index in range(len(self)):
            image = np.asarray(self.pil(index))
            if image.shape[:2] != self.size:
                path = self._reader.filename(int(self._indices[index]), absolute=True)
                raise ValueError(f"{path} is {image.shape[0]}x{image.shape[1]}; expected {self.size[0]}x{self.size[1]}")
            pixels_NHWC[index] = image
        return torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous()

    def subset(self, indices: Sequence[int]) -> "FileImages":
        return FileImages(self._reader, self._indices[torch.as_tensor(indices)])


Images = ArrayImages | FileImages


def load(
    name: str, source: str, root: str | None, num_classes: int, image_size: int, train_size: int, test_size: int
) -> tuple[Images, Images]:
    """The (train, test) images. The two sizes matter to `synthetic` alone: how many images it makes.

    Raises ValueError for a source the dataset does not have, a wrong number of classes or an unreadable image, and
    FileNotFoundError for data that are not there and cannot be downloaded.
    """
    if source not in SOURCES[name]:
        raise ValueError(f"data.source {source!r} is not available for {name}; allowed: {', '.join(SOURCES[name])}")
    if source == "folder":
        return _folder(name, root, num_classes)
    if name == "synthetic":
        return _synthetic(train_size, num_classes, image_size, 0), _synthetic(test_size, num_classes, image_size, 1)
    train, test = _digits(image_size) if name == "digits" else _torchvision(name, root)
    found = 1 + int(max(train.labels.max(), test.labels.max()))
    if found != num_classes:
        raise ValueError(f"data.num_classes is {num_classes}; {name} has {found}")
    return train, test


def _torchvision(name: str, root: str | None) -> tuple[Images, Images]:
    """CIFAR from its original pickles, downloaded to `root` where missing."""
    root = _root(root, f"the directory that holds or shall receive {_ARCHIVES[name][0]}")
    try:
        sets = [
            create_dataset(f"torch/{name}", root=root, split=split, download=True) for split in ("train", "validation")
        ]
    except (OSError, RuntimeError) as error:
        archive, unpacked = _ARCHIVES[name]
        raise FileNotFoundError(
            f"{name} is not in {os.path.abspath(root)} and could not be downloaded ({error}): place {archive} or {unpacked}/ there, "
            f"or set data.source=folder data.root=DIR with DIR/{{train,test}}/<class>/*.jpg"
        ) from error
    train, test = (
        ArrayImages(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))
        for found in sets
    )
    return train, test


def _folder(name: str, root: str | None, num_classes: int) -> tuple[Images, Images]:
    """DIR/train/<class>/* and DIR/<test folder>/<class>/*; classes are numbered in natural order of their names."""
    layout = f"DIR/{{train,{'|'.join(_TEST_FOLDERS[name])}}}/<class>/*.jpg"
    directory = Path(_root(root, f"DIR of {layout}"))
    if not directory.is_dir():
        raise FileNotFoundError(f"data.root {directory} is not a directory; {name} from a folder needs {layout}")
    candidates = [directory / folder for folder in _TEST_FOLDERS[name]]
    test_directory = next((path for path in candidates if path.is_dir()), candidates[0])
    readers = [_reader(path, layout, num_classes) for path in (directory / "train", test_directory)]
    train_classes, test_classes = (set(reader.class_to_idx) for reader in readers)
    if train_classes != test_classes:
        odd = sorted(train_classes ^ test_classes)[0]
        raise ValueError(
            f"class {odd!r} is in only one of {directory / 'train'} and {test_directory}; expected in both"
        )
    return FileImages(readers[0]), FileImages(readers[1])


def _reader(path: Path, layout: str, num_classes: int):
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing; expected the layout {layout}")
    try:
        reader = create_reader("", root=str(path))
    except RuntimeError as error:  # timm's word for a folder without a single image
        raise ValueError(f"{path} holds no images; expected the layout {layout}") from error
    if len(reader.class_to_idx) != num_classes:
        raise ValueError(
            f"{path} has {len(reader.class_to_idx)} classes with images; expected {num_classes} (data.num_classes)"
        )
    return reader


def _root(root: str | None, meaning: str) -> str:
    if not root:
        raise ValueError(f"data.root is {root!r}; expected {meaning}")
    return os.path.expanduser(str(root))


def _digits(image_size: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 8x8 digits, bilinear to image_size, grey in 3 channels: always the same 1,437 train, 360 test."""
    from sklearn.datasets import load_digits  # imported here: a second of start-up that other datasets need not pay
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(image_size, image_size), mode="bilinear", align_corners=False)
    pixels_NCHW = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels_N = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels_N)), test_size=360, stratify=digits.target, random_state=0)
    every = ArrayImages(pixels_NCHW, labels_N)
    return every.subset(train), every.subset(test)


def _synthetic(size: int, num_classes: int, image_size: int, stream: int) -> Images:
    """`size` images of uniform noise with uniform labels, the same in every run."""
    generator = torch.Generator().manual_seed(stream)
    pixels_NCHW = torch.randint(256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    return ArrayImages(pixels_NCHW, torch.randint(num_classes, (size,), generator=generator))
