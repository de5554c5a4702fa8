"""Bytes on their way to the disk: written in full, flushed, copied, put in their place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A file descriptor for the length of the block."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """All of `data` at `offset`: the system may take it in several goes."""
    data = memoryview(data)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def flush_folder(path: Path) -> None:
    """Names that were made, moved or removed in `path` are so on the disk."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


def move(source: Path, target: Path) -> None:
    """Atomically, and for good: both folders are flushed."""
    os.replace(source, target)
    flush_folder(target.parent)
    if source.parent != target.parent:
        flush_folder(source.parent)


def remove(path: Path) -> None:
    os.unlink(path)
    flush_folder(path.parent)


def copy(source: Path, target: Path) -> None:
    """A flushed copy that its owner may write to; the disk shares blocks where it can."""
    with (
        opened(source, os.O_RDONLY) as reading,
        opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as writing,
    ):
        remaining = os.fstat(reading).st_size
        try:  # noqa: SIM105
            while remaining and (copied := os.copy_file_range(reading, writing, remaining)):
                remaining -= copied
        except (OSError, AttributeError):  # AttributeError: macOS has no such call
            pass
        if remaining:
            _copy_through_memory(reading, writing)
        os.fchmod(writing, stat.S_IMODE(os.fstat(reading).st_mode) | stat.S_IWUSR)
        os.fsync(writing)


def _copy_through_memory(reading: int, writing: int) -> None:
    offset = 0
    while data := os.pread(reading, 1 << 22, offset):
        write_at(writing, data, offset)
        offset += len(data)
