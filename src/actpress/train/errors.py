"""Errors that a command reports on one line, and its exit codes. Needs only the standard library."""

BUG, BAD_INPUT, UNHAPPY_END, INTERRUPTED = 1, 2, 3, 130  # UNHAPPY_END: out of memory, diverged, or files not writable


class InputError(ValueError):
    """Bad input. The message is one line that names the value and the allowed ones."""


class Unreadable(ValueError):
    """A record is missing or damaged. The message is one line that names the file."""
