"""Datasets by name, through one of two pipelines that end in the same thing: batches on the device.

`create` reads a data config and a recipe config and returns a `Data`. Two pipelines:
  resident   the whole set as uint8 on the device; crop, flip and normalise there (resident.py)
  stream     decoded and augmented on the host by workers (stream.py)
`pipeline: auto` takes resident where the images fit, have the wanted size and the recipe asks for no more than crop and
flip; otherwise stream. Asking for one that cannot do the work is an error, never a silent change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .augment import Augment, is_number
from .files import ImageError as ImageError
from .files import shown
from .resident import ResidentLoader
from .sources import SOURCES, Images, load
from .stream import StreamLoader

NAMES = tuple(SOURCES)
PIPELINES = ("auto", "resident", "stream")
_RESIDENT_BYTES = 4 * 2**30  # auto keeps sets up to 4 GiB on the device


class Opened(NamedTuple):
    """A dataset whose images are found, but not read: train and test images, and the `facts` by which one set is told from another.

    facts: label, train_images and test_images (numbers), and of a folder of files its fingerprint.
    """

    train: Images
    test: Images
    facts: dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Train and test batches (x float32 normalised [B, 3, S, S], y int64 [B], on the device) and what is known of them.

    `train.set_epoch(e)` makes order and augmentation of the next pass a pure function of (seed, e). len(train) and
    len(test) count batches; train drops the last incomplete one, test keeps it.
    """

    train: ResidentLoader | StreamLoader
    test: ResidentLoader | StreamLoader
    num_classes: int
    facts: dict[str, Any]  # see Opened
    pipeline: str

    @property
    def label(self) -> str:
        return self.facts["label"]

    @property
    def train_images(self) -> int:
        return self.facts["train_images"]

    @property
    def test_images(self) -> int:
        return self.facts["test_images"]


def create(
    data: Mapping[str, Any], recipe: Mapping[str, Any], *, device: torch.device, seed: int, workers: int = 2
) -> Data:
    """Open the dataset `data` describes (configs/data) and batch it as `recipe` asks (batch_size, augment).

    data: name, source, root, num_classes, image_size, mean, std, label, pipeline, train_size, test_size. The two sizes,
    where not null, keep that many images, chosen by one fixed permutation, the same for every seed.
    synthetic images are noise and are not augmented. A folder of files adds its formats to the label, by the
    suffixes in both splits: "CIFAR-10 (JPEG)".

    Raises ValueError for a value that is not allowed, FileNotFoundError for data that are not there, and ImageError, a
    ValueError that names the file, for one that cannot be read: here, or in the stream pipeline when its batch is asked for.
    """
    name, image_size, batch_size = data["name"], data["image_size"], recipe["batch_size"]
    _check_name(name)
    if data["pipeline"] not in PIPELINES:
        raise ValueError(f"data.pipeline {data['pipeline']!r} is unknown; allowed: {', '.join(PIPELINES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed: integers from 0")
    _check_numbers(data, recipe)
    augment = Augment() if name == "synthetic" else Augment.read(recipe["augment"])
    if augment.crop_pct is None:  # before the choice of a pipeline: resident cannot do another one than 1
        augment = replace(augment, crop_pct=0.875 if name == "imagenet" else 1.0)
    largest = image_size - (augment.padding_mode == "reflect")  # mirrored without its edge
    if augment.crop_padding > largest:
        raise ValueError(
            f"augment.crop_padding is {augment.crop_padding}; allowed with {augment.padding_mode}: up to {largest}"
        )

    train, test, facts = open_images(data)
    if batch_size > len(train):
        raise ValueError(f"recipe.batch_size is {batch_size}; allowed: up to the {len(train)} training images")

    pipeline = _pipeline(data["pipeline"], name, (train, test), image_size, augment)
    shared = {
        "batch_size": batch_size,
        "augment": augment,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "device": torch.device(device),
        "seed": seed,
    }
    if pipeline == "resident":
        loaders = [ResidentLoader(images, train=images is train, **shared) for images in (train, test)]
    else:
        shared["image_size"] = image_size
        shared["crop_pct"] = augment.crop_pct
        loaders = [StreamLoader(images, train=images is train, workers=workers, **shared) for images in (train, test)]

    return Data(*loaders, data["num_classes"], facts, pipeline)


def open_images(data: Mapping[str, Any]) -> Opened:
    """The images that `data` describes, and what is known of them. Raises as `create` does."""
    name, sizes = data["name"], (data["train_size"], data["test_size"])
    _check_name(name)
    *full, fingerprint = load(name, data["source"], data["root"], data["num_classes"], data["image_size"], *sizes)
    train, test = (_keep(images, size, key) for images, size, key in zip(full, sizes, ("train", "test"), strict=True))
    label = data["label"]
    formats = sorted({*train.formats, *test.formats})
    if formats and name != "imagenet":
        label = f"{label} ({', '.join(formats)})"
    facts = {"label": label, "train_images": len(train), "test_images": len(test)}
    return Opened(train, test, facts | ({"fingerprint": fingerprint} if fingerprint else {}))


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"data.name {name!r} is unknown; allowed: {', '.join(NAMES)}")


def _check_numbers(data: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    needed = {"data.num_classes": data["num_classes"], "data.image_size": data["image_size"]}
    needed["recipe.batch_size"] = recipe["batch_size"]
    for key in ("train_size", "test_size"):
        if data[key] is not None or data["name"] == "synthetic":
            needed[f"data.{key}"] = data[key]
    for key, value in needed.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} is {value!r}; allowed: integers from 1")
    for key in ("mean", "std"):
        values = data[key]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"data.{key} is {values!r}; allowed: 3 numbers, one for each channel")
        if len(values) != 3:
            raise ValueError(f"data.{key} has {len(values)} values; allowed: 3, one for each channel")
        if not all(is_number(value) for value in values):
            raise ValueError(f"data.{key} is {list(values)}; allowed: finite numbers")
    if min(data["std"]) <= 0:
        raise ValueError(f"data.std is {list(data['std'])}; allowed: numbers above 0")


def _keep(images: Images, size: int | None, key: str) -> Images:
    if size is None or size == len(images):
        return images
    if size > len(images):
        raise ValueError(f"data.{key}_size is {size}; allowed: up to {len(images)}, or null for all")
    return images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:size].tolist())


def _pipeline(asked: str, name: str, sets: tuple[Images, Images], image_size: int, augment: Augment) -> str:
    """The pipeline to use; ValueError if the one that was asked for cannot do what the recipe and the sizes need."""
    if name == "synthetic":
        if asked == "stream":
            raise ValueError("data.pipeline 'stream' is not available for synthetic; allowed: auto, resident")
        return "resident"
    obstacles = [f"augment.{field}" for field in augment.host_only()]
    for images, what in zip(sets, ("images", "test images"), strict=True):
        if images.size != (image_size, image_size):
            example = f" ({shown(images.path(0))})" if images.path(0) else ""
            obstacles.append(f"resizing {images.size[0]}x{images.size[1]} {what} to image_size {image_size}{example}")
    if asked == "resident" and obstacles:
        raise ValueError(f"data.pipeline 'resident' cannot do {', '.join(obstacles)}; allowed here: auto, stream")
    if asked == "auto":
        fits = 3 * image_size**2 * len(sets[0]) <= _RESIDENT_BYTES
        return "resident" if fits and not obstacles else "stream"
    return asked
