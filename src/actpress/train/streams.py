"""Standard output and standard error that never raise: not for a closed pipe (| head -1), not for a full disk.

Text that cannot be written is lost; training continues, and its record says how it ended.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


class Unstoppable:
    """A text stream that drops what it cannot write. error: the first failure other than a closed pipe."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Redirect the stream to /dev/null, with what its buffer holds: Python would raise for it at exit."""
        if not isinstance(error, BrokenPipeError):
            self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unstoppable() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by such streams inside the block. If stdout lost text, one line on stderr says why."""
    before = sys.stdout, sys.stderr
    out, err = (stream and Unstoppable(stream) for stream in before)  # None where the program was started without one
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        for stream in filter(None, (out, err)):
            stream.flush()
        if out and out.error and err:
            print(f"standard output could not be written: {out.error.strerror}", file=err, flush=True)
        sys.stdout, sys.stderr = before
