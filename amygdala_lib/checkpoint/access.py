"""Who may touch a folder and when: a lock, and recovery before anything else."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .journal import bookkeeping, journal_path, recover
from .shards import listed_shards, resolved

_POLL = 0.02  # seconds


@contextmanager
def reading(folder: Path | str, *, wait: float = 0) -> Iterator[Path]:
    """Within the block, the folder holds one whole state: nothing here writes to it.

    Any number of processes may read at a time. What a killed process left half done is undone
    first. Yields the folder. Load models under this, and they are never torn:

        with amy.checkpoint.reading(folder):
            model = AutoModelForCausalLM.from_pretrained(folder)

    Whoever opens the folder without it, while a change is being written or after a kill before the
    next use of this package, may see a mixture of two states. A model that was loaded before, and
    whose memory maps the shards (on the CPU, in the folder's dtype), keeps its values: the next
    change gives the folder new shards and leaves it the old ones. That is seen on Linux only.

    A folder that this user cannot write to, and that nobody has synced, needs no lock.

    Raises CheckpointError if the folder is being written to, and still is after `wait` seconds.
    """
    path = resolved(folder)
    listed_shards(path)  # no bookkeeping in what is no model folder
    with _lock(path) as descriptor:
        if descriptor is None:
            yield path
            return
        until = time.monotonic() + wait
        _take(descriptor, fcntl.LOCK_SH, path, until)
        while journal_path(path).exists():
            # Going from one kind of lock to the other lets others in between, who may recover, too.
            if _taken(descriptor, fcntl.LOCK_EX):
                recover(path)
            elif time.monotonic() < until:
                time.sleep(_POLL)
            else:
                raise CheckpointError(_in_use(descriptor, path))
            _take(descriptor, fcntl.LOCK_SH, path, until)
        yield path


@contextmanager
def writing(folder: Path | str, *, wait: float = 0) -> Iterator[Path]:
    """As `reading`, but alone."""
    path = resolved(folder)
    listed_shards(path)
    with _lock(path) as descriptor:
        if descriptor is None:
            raise CheckpointError(f"{path} cannot be written to: it is read-only, or not yours")
        _take(descriptor, fcntl.LOCK_EX, path, time.monotonic() + wait)
        recover(path)
        yield path


@contextmanager
def _lock(path: Path) -> Iterator[int | None]:
    """The lock file, not yet locked; None if nobody has made one and this user cannot."""
    descriptor = _open_lock(bookkeeping(path))
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)  # which also unlocks


def _open_lock(held: Path) -> int | None:
    try:
        os.makedirs(held, mode=0o700, exist_ok=True)
        return os.open(held / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CheckpointError(f"{held} cannot be used: {error.strerror}") from error
    if not held.exists():
        return None
    try:
        return os.open(held / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"{held} cannot be opened ({error.strerror}): only the user who has synced this folder "
            "can tell whether it is whole. Copy the folder, or ask for a copy"
        ) from error


def _taken(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(descriptor: int, operation: int, path: Path, until: float) -> None:
    while not _taken(descriptor, operation):
        if time.monotonic() >= until:
            raise CheckpointError(_in_use(descriptor, path))
        time.sleep(_POLL)


def _in_use(descriptor: int, path: Path) -> str:
    return (
        f"{path} is in use by {_holders(descriptor)}. Try again when that is done, or pass "
        "wait=SECONDS"
    )


def _holders(descriptor: int) -> str:
    """Who has the lock: pids where the system tells them (Linux)."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    inode = str(os.fstat(descriptor).st_ino)
    pids = {
        int(pid)
        for _, kind, _, _, pid, place, *_ in (line.split() for line in lines)
        if kind == "FLOCK" and place.rpartition(":")[2] == inode
    }
    return ("process " + ", ".join(map(str, sorted(pids)))) if pids else "another process"
