"""Sources of images: torchvision's archives, a folder of image files, an array of decoded images, a data set that ships with a package.

`load` returns the train and the test images of a dataset as `ArrayImages` (one uint8 tensor) or `FileImages` (files
decoded when asked for). Both offer: len, size (height, width), formats (of the files), labels int64 [N],
pixels() -> uint8 [N, 3, H, W], read(i) -> (RGB image, notes on it), pil(i) -> RGB image, path(i), subset(indices).
"""

import http.client
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor

from actpress.train import files

from . import folder
from .files import FileImages

SOURCES = {
    "cifar10": ("torchvision", "folder", "array"),
    "cifar100": ("torchvision", "folder", "array"),
    "imagenet": ("folder",),
    "synthetic": ("builtin",),
    "digits": ("builtin",),
}
_ARCHIVES = {  # what torchvision looks for: archive, or the folder it unpacks to
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python"),
}
_TEST_FOLDERS = {"cifar10": ("test",), "cifar100": ("test",), "imagenet": ("val", "validation")}


class ArrayImages:
    """Images held as one uint8 tensor [N, 3, H, W] on the CPU, with int64 labels [N]."""

    def __init__(self, pixels_NCHW: Tensor, labels_N: Tensor, formats: tuple[str, ...] = ()) -> None:
        self._pixels = pixels_NCHW
        self.labels = labels_N
        self.size = tuple(pixels_NCHW.shape[2:])
        self.formats = formats

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        return self._pixels

    def path(self, index: int) -> None:
        return None

    def read(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        return self.pil(index), ()

    def pil(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index].permute(1, 2, 0).numpy())

    def subset(self, indices: Sequence[int]) -> "ArrayImages":
        chosen = torch.as_tensor(indices)
        return ArrayImages(self._pixels[chosen], self.labels[chosen], self.formats)


Images = ArrayImages | FileImages


def load(
    name: str, source: str, root: str | None, num_classes: int, image_size: int, train_size: int, test_size: int
) -> tuple[Images, Images, str | None]:
    """The (train, test) images, and the fingerprint of the folder's files, also where an array holds them decoded; None for other sources.

    train_size and test_size are read by `synthetic` alone: the number of images to generate.

    Raises ValueError for a source the dataset does not have, a wrong number of classes or an unreadable image, and
    FileNotFoundError for data that are not there and cannot be downloaded.
    """
    if source not in SOURCES[name]:
        raise ValueError(f"data.source {source!r} is not available for {name}; allowed: {', '.join(SOURCES[name])}")
    if source == "folder":
        return _folder(name, root, num_classes)
    if source == "array":
        return _array(root, num_classes)
    if name == "synthetic":
        sizes = (train_size, test_size)
        train, test = (_synthetic(size, num_classes, image_size, stream) for stream, size in enumerate(sizes))
        return train, test, None
    train, test = _digits(image_size) if name == "digits" else _torchvision(name, root)
    found = 1 + int(max(train.labels.max(), test.labels.max()))
    if found != num_classes:
        raise ValueError(f"data.num_classes is {num_classes}; {name} has {found}")
    return train, test, None


def _torchvision(name: str, root: str | None) -> tuple[Images, Images]:
    """CIFAR from its original pickles, downloaded to `root` if they are missing."""
    root = _root(root, f"the directory that holds or shall receive {_ARCHIVES[name][0]}")
    try:
        sets = [
            create_dataset(f"torch/{name}", root=root, split=split, download=True) for split in ("train", "validation")
        ]
    except (OSError, RuntimeError, http.client.HTTPException) as error:
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


def _folder(name: str, root: str | None, num_classes: int) -> tuple[Images, Images, str]:
    """DIR/train/<class>/** and DIR/<test folder>/<class>/**; classes are numbered in natural order of their names."""
    layout = f"DIR/{{train,{'|'.join(_TEST_FOLDERS[name])}}}/<class>/*.jpg"
    directory = Path(_root(root, f"DIR of {layout}"))
    if not directory.is_dir():
        raise FileNotFoundError(f"data.root {directory} is not a directory; {name} from a folder needs {layout}")
    candidates = [directory / split for split in _TEST_FOLDERS[name]]
    test_directory = next((path for path in candidates if path.is_dir() or path.is_symlink()), candidates[0])
    train, test = folder.read(directory / "train", test_directory, layout, num_classes)
    return FileImages(train.samples), FileImages(test.samples), folder.fingerprint(train, test)


_SPLITS = ("train", "test")


def save_array(path: Path, train: Images, test: Images, fingerprint: str) -> None:
    """Write both splits, decoded, as one uncompressed .npz: uint8 [N, 3, H, W] and int64 [N] each, the files' formats, the fingerprint."""
    content: dict[str, np.ndarray] = {"fingerprint": np.array(fingerprint)}
    for split, images in zip(_SPLITS, (train, test), strict=True):
        content |= {f"{split}_pixels": images.pixels().numpy(), f"{split}_labels": images.labels.numpy()}
        content[f"{split}_formats"] = np.array(images.formats, dtype=str)
    with files.atomic_write(path) as file:
        np.savez(file, **content)


def _array(root: str | None, num_classes: int) -> tuple[Images, Images, str]:
    """Read what `save_array` wrote. The fingerprint is that of the decoded files."""
    path = Path(_root(root, "the .npz that scripts/pack_images.py writes"))
    try:
        with np.load(path, allow_pickle=False) as content:
            train, test = (
                ArrayImages(
                    torch.from_numpy(content[f"{split}_pixels"]),
                    torch.from_numpy(content[f"{split}_labels"]),
                    tuple(map(str, content[f"{split}_formats"])),
                )
                for split in _SPLITS
            )
            fingerprint = str(content["fingerprint"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.root {path} is not there; scripts/pack_images.py writes such a file") from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.root {path} is not a file that scripts/pack_images.py wrote ({error})") from error
    if (found := 1 + int(max(train.labels.max(), test.labels.max()))) != num_classes:
        raise ValueError(f"data.num_classes is {num_classes}; {path} has {found}")
    return train, test, fingerprint


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
