"""Files that strangers made, opened with care; files of ours, written as a whole; text from either, for a terminal."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading, and never waits: opening a FIFO would, and some devices never end.

    Raises:
        OSError: the file cannot be opened, or is not a regular one.
        ValueError: the path holds a null character, which no file's name does.
    """
    name = printable(os.fspath(path))
    if "\0" in str(os.fspath(path)):
        raise ValueError(f"{name} holds a null character, which no file's name does")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind in _KINDS:
            raise OSError(f"{name} is {_KINDS[kind]}, accepted: a regular file")
        return os.fdopen(descriptor, "rb")  # IsADirectoryError for a folder
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Has a file written as a whole or not at all, whatever ends the process or the machine meanwhile.

    Yields the path to write to, beside the file that it then replaces. Its content reaches the disk before its name
    does, and both before this returns. What is left over after an error is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text: object, limit: int | None = None) -> str:
    """The text on one line and in one column: tabs, line ends, control characters and undecodable bytes escaped.

    Args:
        limit: characters at most, or None; of a longer text the middle is left out.
    """
    written = _shortened(str(text), limit)  # so that no long text is escaped
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in written)
    return _shortened(escaped, limit)


def _shortened(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
