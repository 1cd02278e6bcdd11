"""Class folders: DIR/<split>/<class>/**/<image>, two splits with the same classes.

The folders directly under a split are the classes, numbered in natural order of their names. Images in sub-folders belong to the
class folder above them. Links are followed; no file is listed twice, not through hard links either, and a link back into the data
set is not followed. One warning counts the entries that are not used: hidden ones, files that are no images, images outside a class.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .files import FORMAT_OF, Notes, shown

_SYSTEM = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}  # folders no user made
_NAMED = 5  # how many names an error lists

HIDDEN = "hidden or system entries"
OUTSIDE = "images beside the class folders"
AGAIN = "links to what is listed already"
SPECIAL = "entries that are neither files nor folders"


@dataclass
class Split:
    """One of the two folders, read: `classes` in natural order, `samples` as (path, class index) in natural order of the paths."""

    path: Path
    classes: list[str] = field(default_factory=list)
    samples: list[tuple[str, int]] = field(default_factory=list)
    links: list[tuple[str, str, str]] = field(default_factory=list)  # images that are links: (path, real path, class)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)  # real path of a linked image -> (path, class)
    folders: dict[str, tuple[str, str]] = field(default_factory=dict)  # real path of a folder -> (path, class)
    inodes: dict[str, int] = field(
        default_factory=dict
    )  # path of an image -> number of its file on the device it lies on
    nested: str | None = None  # an image in a sub-folder of a class folder

    def where(self, real: str) -> tuple[str, str] | None:
        """(path, class) under which the image at this real path is listed; None if it is not."""
        if real in self.files:
            return self.files[real]
        above, name = os.path.split(real)
        if above not in self.folders or not _is_image(name):
            return None
        folder, label = self.folders[above]
        return os.path.join(folder, name), label


def read(train: Path, test: Path, layout: str, num_classes: int) -> tuple[Split, Split]:
    """Read both splits. Warns of entries that are not used.

    Raises FileNotFoundError for a missing split, ValueError for classes that differ, are empty, or are not num_classes in number, for a
    file that is listed in two classes, and for a broken link.
    """
    for path in (train, test):
        if not path.is_dir():
            what = "a broken link" if path.is_symlink() and not path.exists() else "missing"
            raise FileNotFoundError(f"{shown(path)} is {what}; expected the layout {layout}")
    unused = Notes()
    classes = [_class_folders(path, unused) for path in (train, test)]
    own = [os.path.realpath(entry.path) for entries in classes for entry in entries]
    own += [os.path.realpath(path) for path in (train, test)]
    splits = [_scan(path, entries, own, unused) for path, entries in zip((train, test), classes, strict=True)]
    for split in splits:
        _drop_repeated_links(split, unused)
    _compare(*splits, _drop_repeated_hard_links(*splits, unused))
    unused.warn("not used in the image folders: ")
    for split in splits:
        _check_filled(split, layout)
    _check_classes(*splits, num_classes)
    return splits[0], splits[1]


def fingerprint(*splits: Split) -> str:
    """Identity of image folders without reading images: a hash of every image's class, name in its split, and size in bytes."""
    digest = hashlib.sha256()
    for split in splits:
        start = len(os.fspath(split.path)) + 1
        for path, index in split.samples:
            size = os.stat(path).st_size if os.path.exists(path) else None  # a dead link
            digest.update(f"{split.classes[index]!r} {path[start:]!r} {size}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _class_folders(path: Path, unused: Notes) -> list[os.DirEntry]:
    """The class folders of a split, in natural order, without links to a folder that holds the split."""
    found = []
    real = os.path.realpath(path)
    for entry in _entries(path, unused):
        if not _is_folder(entry):
            kind = _other(entry)
            unused.add(OUTSIDE if _is_image(entry.name) and kind != SPECIAL else kind, entry.path)
        elif entry.is_symlink() and _holds(os.path.realpath(entry.path), real):
            unused.add(AGAIN, entry.path)
        else:
            found.append(entry)
    return sorted(found, key=lambda entry: (_natural(entry.name), entry.name))


def _scan(path: Path, entries: list[os.DirEntry], own: list[str], unused: Notes) -> Split:
    split = Split(path, [entry.name for entry in entries])
    for index, entry in enumerate(entries):
        split.samples += ((image, index) for image in _images(entry.path, entry.name, split, own, unused))
    split.samples.sort(key=lambda sample: (_natural(sample[0]), sample[0]))
    return split


def _images(folder: str, label: str, split: Split, own: list[str], unused: Notes) -> Iterator[str]:
    """Paths of the images in and under `folder`, each real folder once; `own` are the real paths of the data set's folders."""
    real = os.path.realpath(folder)
    if real in split.folders:
        _check_same_class(folder, label, *split.folders[real])
        unused.add(AGAIN, folder)
        return
    split.folders[real] = folder, label
    for entry in _entries(folder, unused):
        if _is_folder(entry):
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if any(_holds(target, kept) or _holds(kept, target) for kept in own):
                    unused.add(AGAIN, entry.path)
                    continue
            yield from _images(entry.path, label, split, own, unused)
        elif not _is_image(entry.name):
            unused.add(_other(entry), entry.path)
        elif not _is_file(entry):
            unused.add(SPECIAL, entry.path)
        else:
            if not entry.is_symlink():
                split.inodes[entry.path] = entry.inode()  # from the listing: no call for each of a million files
            elif os.path.exists(entry.path):
                split.inodes[entry.path] = os.stat(entry.path).st_ino
                split.links.append((entry.path, os.path.realpath(entry.path), label))
            if split.nested is None and os.path.dirname(folder) != os.fspath(split.path):
                split.nested = entry.path
            yield entry.path


def _drop_repeated_links(split: Split, unused: Notes) -> None:
    """Drop images that are links to images of the same split. Raises ValueError if their classes differ."""
    repeated = set()
    for path, real, label in split.links:
        first = split.where(real)
        if first is None:
            split.files[real] = path, label
        else:
            _check_same_class(path, label, *first)
            repeated.add(path)
            unused.add(AGAIN, path)
    _drop(split, repeated)


def _drop_repeated_hard_links(
    train: Split, test: Split, unused: Notes
) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The same for hard links. Returns the images that both splits hold: (path, class) in test, (path, class) in train."""
    seen, repeated = set(), set()
    for split in (train, test):
        for inode in split.inodes.values():
            (repeated if inode in seen else seen).add(inode)
    firsts = []
    for split in (train, test):
        first, again = {}, set()
        for path, index in split.samples:
            if split.inodes.get(path) not in repeated:
                continue
            status = os.stat(path)
            if status.st_nlink == 1:  # met through a symbolic link, or its number on another device
                continue
            place = first.setdefault((status.st_dev, status.st_ino), (path, split.classes[index]))
            if place[0] != path:
                _check_same_class(path, split.classes[index], *place)
                again.add(path)
                unused.add(AGAIN, path)
        _drop(split, again)
        firsts.append(first)
    return [(firsts[1][file], firsts[0][file]) for file in firsts[1] if file in firsts[0]]


def _drop(split: Split, paths: set[str]) -> None:
    if paths:
        split.samples = [sample for sample in split.samples if sample[0] not in paths]


def _compare(train: Split, test: Split, hard_links: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
    """Warn of images that both splits hold through links: their test accuracy is a training accuracy."""
    shared = Notes()
    pairs = [(found, train.folders.get(real)) for real, found in test.folders.items()]
    pairs += [(found, train.where(real)) for real, found in test.files.items()]
    pairs += [(found, test.where(real)) for real, found in train.files.items() if real not in test.files]
    pairs += [(found, other) for found, other in hard_links if os.path.realpath(found[0]) != os.path.realpath(other[0])]
    for (path, label), other in pairs:
        if other is not None:
            _check_same_class(path, label, *other)
            shared.add("files or folders are in both", path)
    shared.warn("training images are tested on: ")


def _check_same_class(path: str, label: str, other_path: str, other: str) -> None:
    if label != other:
        here, there = _told_apart([label, other])
        raise ValueError(
            f"{shown(path)} and {shown(other_path)} are the same, through links, in class {here} and in class {there}; "
            "expected in one class"
        )


def _check_filled(split: Split, layout: str) -> None:
    if not split.samples:
        raise ValueError(f"{shown(split.path)} holds no images in class folders; expected the layout {layout}")
    filled = {label for _, label in split.samples}
    empty = [name for index, name in enumerate(split.classes) if index not in filled]
    if empty:
        paths = [shown(split.path / name) for name in empty]
        raise ValueError(
            f"class folder without images: {_listed(paths)}; expected at least one image in each class folder"
        )


def _check_classes(train: Split, test: Split, num_classes: int) -> None:
    odd = [name for name in train.classes if name not in set(test.classes)]
    odd += [name for name in test.classes if name not in set(train.classes)]
    if odd:
        which = "class" if len(odd) == 1 else "classes"
        raise ValueError(
            f"{which} {_listed(_told_apart(odd))}: in only one of {shown(train.path)} and {shown(test.path)}; "
            "expected in both"
        )
    if len(train.classes) != num_classes:
        nested = f"; {shown(train.nested)} belongs to the class folder above it" if train.nested else ""
        raise ValueError(
            f"{shown(train.path)} has {len(train.classes)} classes with images; expected {num_classes} (data.num_classes): "
            f"{_listed(_told_apart(train.classes))}{nested}"
        )


def _told_apart(names: list[str]) -> list[str]:
    """The names quoted, in ASCII if they look like another one, such as composed and decomposed accents."""
    look = [unicodedata.normalize("NFKC", name) for name in names]
    counts = Counter(look)
    return [ascii(name) if counts[as_seen] > 1 else repr(name) for name, as_seen in zip(names, look, strict=True)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _entries(folder: str | Path, unused: Notes) -> list[os.DirEntry]:
    """The entries of a folder by name, without hidden ones of a system or an editor."""
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if _is_hidden(entry.name):
            unused.add(HIDDEN, entry.path)
    return [entry for entry in entries if not _is_hidden(entry.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder. os.path.isdir for links: a link to itself is no folder, but DirEntry.is_dir raises for it."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry that is no folder may be read as a file. True for a broken link, whose reading raises an error that names it."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in FORMAT_OF


def _other(entry: os.DirEntry) -> str:
    """The word under which an entry that is no folder is counted. Raises ValueError for a broken link, which may point to a folder."""
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            raise ValueError(
                f"{shown(entry.path)} is a broken link ({error.strerror}); expected one to a folder or a file"
            ) from error
    if not _is_file(entry):
        return SPECIAL
    suffix = os.path.splitext(entry.name)[1].lower()
    return f"{suffix} files" if suffix else "files without a suffix"


def _holds(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies in it; both real paths."""
    return os.path.commonpath([folder, path]) == folder


def _natural(name: str) -> list[str | int]:
    """Sort key with numbers by value, letters without case: text and numbers in turn."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]
