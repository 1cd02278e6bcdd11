"""Class folders: the labels are the folders under train/ and test/, no image is listed twice, what is not used is named."""

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers import create_reader

from actpress.train.data import folder
from actpress.train.errors import InputError
from datasets import create

SHADES = {"cat": 10, "dog": 200}


def picture(path: Path, shade: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(path)


def tree(root: Path, *places: str) -> Path:
    """Three images in each place, a path that starts with the class, in train and in test."""
    for split in ("train", "test"):
        for place in places or SHADES:
            for index in range(3):
                picture(root / split / place / f"{index}.png", SHADES[place.split("/")[0]])
    return root


def load(root: Path, num_classes: int = 2):
    """(the data, what was warned of, as one text)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = create("cifar10", batch_size=2, source="folder", root=str(root), num_classes=num_classes)
    assert len(said) <= 2 and all("\n" not in str(warning.message) for warning in said)
    return found, " | ".join(str(warning.message) for warning in said)


def labels(found) -> dict[int, list[int]]:
    """Shade -> the labels it has, of every training image."""
    shades = found.train.pixels[:, 0, 0, 0].tolist()
    pairs = sorted(zip(shades, found.train.labels.tolist(), strict=True))
    return {shade: [label for other, label in pairs if other == shade] for shade in dict(pairs)}


def refusal(root: Path, num_classes: int = 2) -> str:
    with pytest.raises(ValueError) as caught:
        load(root, num_classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plain_tree_is_read_in_silence(tmp_path):
    found, said = load(tree(tmp_path))
    assert labels(found) == {10: [0] * 3, 200: [1] * 3} and said == ""


def test_images_in_sub_folders_belong_to_their_class_folder(tmp_path):
    found, said = load(tree(tmp_path, "cat/batch1", "cat/batch2/deep", "dog/batch1", "dog"))
    assert labels(found) == {10: [0] * 6, 200: [1] * 6} and said == ""


def test_a_wrong_number_of_classes_names_them_and_a_sub_folder(tmp_path):
    message = refusal(tree(tmp_path, "cat/tabby", "cat/siam", "dog"), 3)
    for words in ("has 2 classes", "expected 3", "'cat', 'dog'", "cat/siam/0.png belongs to the class folder above it"):
        assert words in message


@pytest.mark.parametrize("kind", ["up", "loop", "twice", "sibling", "other split", "linked file", "class"])
def test_no_image_is_listed_twice_through_links(tmp_path, kind):
    root = tree(tmp_path, "cat", "dog", "dog/more")
    dog = root / "train" / "dog"
    if kind == "class":
        (root / "train" / "up").symlink_to(root)
        name = "up"
    else:
        targets = {"up": "..", "loop": ".", "twice": "more", "sibling": "../cat", "other split": "../../test"}
        name = "more/again.png" if kind == "linked file" else "zzz"
        (dog / name).symlink_to(targets.get(kind, "../0.png"))
    found, said = load(root)
    assert found.train_images == 9 and labels(found) == {10: [0] * 3, 200: [1] * 6}
    assert "1 links to what is listed already" in said and name in said


def test_links_out_of_the_data_set_are_followed_once(tmp_path):
    root = tree(tmp_path / "set")
    for index in range(4):
        picture(tmp_path / "pool" / "deep" / f"{index}.png", 200)
    picture(tmp_path / "lone.png", 200)
    (tmp_path / "pool" / "back").symlink_to(tmp_path / "pool")
    for name in ("a", "b"):
        (root / "train" / "dog" / name).symlink_to(tmp_path / "pool")
        (root / "train" / "dog" / f"{name}.png").symlink_to(tmp_path / "lone.png")
    found, said = load(root)
    assert labels(found) == {10: [0] * 3, 200: [1] * 8}
    assert "3 links to what is listed already" in said  # back, b and b.png


def test_class_folders_may_be_links(tmp_path):
    root = tree(tmp_path / "set")
    (root / "train" / "dog").rename(tmp_path / "kept")
    (root / "train" / "dog").symlink_to(tmp_path / "kept")
    found, said = load(root)
    assert labels(found) == {10: [0] * 3, 200: [1] * 3} and said == ""


@pytest.mark.parametrize("kind", ["file", "folder", "class", "file in the other split", "folder in the other split"])
def test_an_image_in_two_classes_is_refused(tmp_path, kind):
    root = tree(tmp_path, "cat", "dog", "cat/more")
    classes = 2
    if kind == "file":
        (root / "train" / "dog" / "x.png").symlink_to("../cat/0.png")
    elif kind == "file in the other split":
        (root / "test" / "dog" / "x.png").symlink_to("../../train/cat/0.png")
    elif kind == "folder":
        for name in SHADES:
            (root / "train" / name / "x").symlink_to(tmp_path / "pool")
        picture(tmp_path / "pool" / "0.png")
    elif kind == "folder in the other split":
        (root / "test" / "dog").rename(root / "gone")
        (root / "test" / "dog").symlink_to("../train/cat")
    else:
        for split in ("train", "test"):
            (root / split / "kitten").symlink_to("cat/more")
        classes = 3
    message = refusal(root, classes)
    assert (
        "are the same, through links, in class" in message and "'cat'" in message and "expected in one class" in message
    )


def test_testing_on_training_images_is_said(tmp_path):
    root = tree(tmp_path)
    (root / "test" / "dog" / "x.png").symlink_to("../../train/dog/0.png")
    assert "training images are tested on: 1 files or folders are in both" in load(root)[1]
    (root / "test").rename(root / "gone")
    (root / "test").symlink_to("train")
    found, said = load(root)
    assert found.test_images == 6 and "training images are tested on: 2 files or folders are in both" in said


def test_hard_links_are_listed_once(tmp_path):
    root = tree(tmp_path / "set")
    dog = root / "train" / "dog"
    os.link(dog / "0.png", dog / "again.png")
    (dog / "more").mkdir()
    os.link(dog / "0.png", dog / "more" / "again.png")
    (dog / "through.png").symlink_to(tmp_path / "kept.png")
    os.link(dog / "1.png", tmp_path / "kept.png")
    os.link(dog / "2.png", tmp_path / "backup.png")
    found, said = load(root)
    assert labels(found) == {10: [0] * 3, 200: [1] * 3}
    assert f"3 links to what is listed already (such as {dog / 'again.png'})" in said


def test_numbers_of_files_that_are_the_same_on_two_devices_mean_nothing(tmp_path, monkeypatch):
    root = tree(tmp_path)
    for path in root.rglob("*.png"):
        os.link(path, path.with_suffix(".kept"))
    real = folder._images

    def images(path, label, split, *others):
        found = list(real(path, label, split, *others))
        split.inodes.update(dict.fromkeys(found, 2**32 - 1))
        return found

    monkeypatch.setattr(folder, "_images", images)
    found, said = load(root)
    assert (found.train_images, found.test_images) == (6, 6)
    assert "listed already" not in said and "tested on" not in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_hard_link_in_two_classes_is_refused(tmp_path, split):
    root = tree(tmp_path)
    os.link(root / "train" / "cat" / "0.png", root / split / "dog" / "x.png")
    message = refusal(root)
    assert "are the same, through links, in class" in message and f"{split}/dog/x.png" in message


def test_testing_on_hard_links_to_training_images_is_said_once(tmp_path):
    root = tree(tmp_path / "set")
    for index in range(2):
        os.link(root / "train" / "dog" / f"{index}.png", root / "test" / "dog" / f"x{index}.png")
    os.link(root / "train" / "dog" / "2.png", tmp_path / "backup.png")
    (root / "test" / "dog" / "y.png").symlink_to("../../train/dog/2.png")
    assert "training images are tested on: 3 files or folders are in both" in load(root)[1]


@pytest.mark.parametrize("where", ["train", "train/cat", "test/dog"])
def test_hidden_entries_are_skipped_and_counted(tmp_path, where):
    root = tree(tmp_path)
    picture(root / where / ".ipynb_checkpoints" / "0-checkpoint.png")
    picture(root / where / "__MACOSX" / "0.png")
    (root / where / "._0.png").write_bytes(b"\0\5\x16\7")
    found, said = load(root)
    assert (found.train_images, found.test_images) == (6, 6)
    assert "3 hidden or system entries" in said and where in said


def test_stray_images_and_other_files_are_counted_by_kind(tmp_path):
    root = tree(tmp_path)
    picture(root / "train" / "stray.png")
    for name in ("labels.csv", "cat/a.heic", "cat/b.HEIC", "dog/Thumbs.db", "dog/README"):
        (root / "train" / name).write_bytes(b"x")
    found, said = load(root)
    assert found.train_images == 6
    words = (
        "1 images beside the class folders",
        "stray.png",
        "1 .csv files",
        "2 .heic files",
        "cat/a.heic",
        "1 .db files",
    )
    for word in (*words, "1 files without a suffix"):
        assert word in said


@pytest.mark.parametrize("name", ["dog/x.png", "dog/x", "x.png", "bird"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_neither_file_nor_folder_is_counted_and_not_opened(tmp_path, name, linked):
    root = tree(tmp_path / "set")
    place = root / "train" / name
    pipe = tmp_path / "pipe" if linked else place
    os.mkfifo(pipe)
    if linked:
        place.symlink_to(pipe)
    found, said = load(root)
    assert found.train_images == 6
    assert f"1 entries that are neither files nor folders (such as {place})" in said


@pytest.mark.parametrize("name", ["bird", "v1.2", "dog/more", "dog/notes.txt", "x.png"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_broken_link_that_may_stand_for_a_folder_is_named(tmp_path, name, target):
    place = tree(tmp_path) / "train" / name
    place.symlink_to("/nowhere/at/all" if target == "nowhere" else place.name)
    reason = "No such file or directory" if target == "nowhere" else "Too many levels of symbolic links"
    assert refusal(tmp_path) == f"{place} is a broken link ({reason}); expected one to a folder or a file"


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_that_is_a_broken_link_is_named(tmp_path, name):
    tree(tmp_path)
    (tmp_path / "test").rename(tmp_path / "validation")
    (tmp_path / "train").rename(tmp_path / "kept")
    (tmp_path / "train").symlink_to("nowhere" if name == "train" else "kept")
    if name == "val":
        (tmp_path / "val").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=rf"/{name} is a broken link; expected the layout"):
        create("imagenet", batch_size=2, root=str(tmp_path), num_classes=2)


def test_a_split_without_class_folders_is_refused(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "0.png")
    assert "train holds no images in class folders" in refusal(tmp_path)


@pytest.mark.parametrize("classes", [2, 3])
def test_empty_class_folders_are_named(tmp_path, classes):
    root = tree(tmp_path)
    (root / "train" / "bird").mkdir()
    assert "class folder without images" in refusal(root, classes) and "train/bird" in refusal(root, classes)
    (root / "train" / "bird").rmdir()
    (root / "test" / "bird" / "deep").mkdir(parents=True)
    assert "test/bird" in refusal(root, classes)


def test_classes_that_differ_are_named(tmp_path):
    root = tree(tmp_path)
    for index in range(7):
        picture(root / "train" / f"extra{index}" / "0.png")
    picture(root / "test" / "Cat" / "0.png")
    message = refusal(root)
    assert "classes 'extra0'" in message and "and 3 more" in message and "only one of" in message


def test_class_names_that_look_the_same_are_told_apart(tmp_path):
    root = tree(tmp_path)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    picture(root / "train" / composed / "0.png")
    picture(root / "train" / "\u00fc" / "0.png")
    picture(root / "test" / decomposed / "0.png")
    assert f"classes {composed!a}, '\u00fc', {decomposed!a}: in only one of" in refusal(root)
    (root / "test" / decomposed).rename(root / "train" / decomposed)
    os.link(root / "train" / composed / "0.png", root / "train" / decomposed / "1.png")
    assert f"in class {composed!a} and in class {decomposed!a};" in refusal(root)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path)
    real = folder.os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(folder.os, "scandir", scandir)
    with pytest.raises(PermissionError, match="train/dog"):
        load(root)


def test_classes_and_images_are_in_the_order_of_timm(tmp_path):
    """The order decides the labels and which image an epoch draws, so that records stay comparable."""
    names = ["n2", "n10", "n1", "a-b", "a", "a b", "B", "c_3", "c_03x"]
    generator = random.Random(0)
    for split in ("train", "test"):
        for name in names:
            for _ in range(4):
                picture(tmp_path / split / name / f"{generator.choice('xY-_')}{generator.randrange(2000)}.png")
    reader = create_reader("", root=str(tmp_path / "train"))
    train, _ = folder.read(tmp_path / "train", tmp_path / "test", "", len(names))
    assert train.samples == reader.samples
    assert {name: index for index, name in enumerate(train.classes)} == reader.class_to_idx


def test_a_folder_decoded_once_is_the_same_data_set(tmp_path, script, capsys):
    """In one array: images, labels, label and fingerprint."""
    classes = [f"class {number}" for number in range(10)]
    root, path = tmp_path / "images", tmp_path / "array.npz"
    for number, name in enumerate(classes):
        for split in ("train", "test"):
            picture(root / split / name / "0.jpg", 20 * number)
    script("pack_images").main(["cifar10", f"--root={root}", f"--out={path}"])
    assert "10 train and 10 test images, CIFAR-10 (JPEG)" in capsys.readouterr().out
    packed = create("cifar10", batch_size=2, source="array", root=str(path), num_classes=10)
    files = create("cifar10", batch_size=2, source="folder", root=str(root), num_classes=10)
    assert packed.facts == files.facts and packed.pipeline == files.pipeline == "resident"
    for ours, theirs in ((packed.train, files.train), (packed.test, files.test)):
        assert torch.equal(ours.pixels, theirs.pixels) and torch.equal(ours.labels, theirs.labels)
    with pytest.raises(ValueError, match=r"data\.num_classes is 5; .*array\.npz has 10"):
        create("cifar10", batch_size=2, source="array", root=str(path), num_classes=5)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"array\.npz is not a file that scripts/pack_images\.py wrote"):
        create("cifar10", batch_size=2, source="array", root=str(path), num_classes=10)
    with pytest.raises(FileNotFoundError, match="is not there; scripts/pack_images"):
        create("cifar10", batch_size=2, source="array", root=str(tmp_path / "other.npz"), num_classes=10)
    for given, message in (
        (["imagenet", "--root=r", "--out=o"], "argument data: imagenet, allowed: cifar10, cifar100"),
        (["cifar10", f"--root={root}"], "the following arguments are required: --out"),
    ):
        with pytest.raises(InputError, match=message):
            script("pack_images").main(given)
