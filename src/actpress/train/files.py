"""Files: names, atomic writes, and checks that a file or folder can be written. Needs only the standard library."""

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def slug(name: str) -> str:
    """A file name made of a device's or unit's name: "NVIDIA H100 80GB" -> "nvidia-h100-80gb"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def id_word(label: object) -> str:
    """One word of an id whose words are joined by "-": letters, digits, "_" and "." stay, all else becomes "_"."""
    return re.sub(r"[^\w.]+", "_", str(label))


class WriteError(OSError):
    """A file could not be written. The message, one line, names the file and the cause, such as "No space left on device"."""

    def __init__(self, path: Path | str, cause: OSError):
        super().__init__(f"{path} could not be written: {cause.strerror or cause}")
        self.path, self.cause = path, cause

    def __reduce__(self):  # pickling OSError's own arguments would pass the message alone to __init__
        return type(self), (self.path, self.cause)


class _Raw(io.FileIO):
    """A file that remembers why it could not be written: torch.save hides the cause behind an error of its own."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` when the block ends, after it has reached the disk.

    If the block raises, or the process dies, `path` stays as it was. Two processes must not write one path at the same time.
    Raises WriteError if the file cannot be written, also where the block raised another error because of that.
    """
    path = Path(path)
    temporary = _temporary(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _Raw(temporary, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            with write_errors(path):
                file.flush()
                os.fsync(file.fileno())
        with write_errors(path):
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if raw.failure is None or isinstance(error, WriteError):
            raise
        raise WriteError(path, raw.failure) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path | str, text: str) -> None:
    """Replace the file `path` by `text` in UTF-8, atomically. Raises WriteError."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_file(path: Path) -> None:
    """Raise ValueError if a folder prevents the file `path` from being written."""
    for place in (path, _temporary(path)):
        if place.is_dir():
            raise ValueError(f"{place} must be a file, but it is a folder; move it away")


def check_folder(key: str, folder: Path | str) -> None:
    """Raise ValueError, which names `key` and the obstacle, unless `folder` can be written to, or can be created. Creates nothing."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise ValueError(f"{key}={folder} must be the path of a folder")
    folder = Path(folder)
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"{key}={folder} must be a folder, but {nearest} is a file; move it away or set another {key}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder} must be writable, but {nearest} is read-only; set another {key}")


def make_folder(key: str, folder: Path | str) -> None:
    """Create `folder` and try to write to it. Raises ValueError, which names `key` and the cause, if that fails."""
    check_folder(key, folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"{key}={folder} must be writable, but: {error.strerror}; set another {key}") from error
