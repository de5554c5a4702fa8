"""The journal: how to undo the change in progress, on disk before the first byte is changed.

While `.amygdala/journal.safetensors` is there, the folder may hold any mixture of two states; it is
removed, or moved into the history, when the folder holds one of them. The delta in it has the old
values themselves, so that it can be applied to any mixture, and any number of times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from ..errors import CheckpointError
from .delta import Delta, Step
from .disk import flush_folder, move, remove, write_at
from .encodings import BLOCK, Data
from .shards import ModelFolder, Piece, shortened

TEMPORARY = ".tmp"


def bookkeeping(path: Path) -> Path:
    return path / ".amygdala"


def journal_path(path: Path) -> Path:
    return bookkeeping(path) / "journal.safetensors"


def recover(path: Path) -> None:
    """Undo what a killed process has left half done. The caller holds the exclusive lock.

    Raises CheckpointError if it cannot be undone; the journal then stays for the next time.
    """
    try:
        for left in bookkeeping(path).glob(f"*{TEMPORARY}"):
            remove(left)
        if journal_path(path).exists():
            undo(ModelFolder.open(path), Delta.open(journal_path(path)))
    except OSError as error:
        raise CheckpointError(
            f"{path} holds half a change, which cannot be undone ({error}): once the disk can be "
            "written to, any use of the folder undoes it"
        ) from error


def commit(temporary: Path, path: Path) -> None:
    """From here on, whoever opens the folder next undoes what has been written of the change."""
    move(temporary, journal_path(path))
    flush_folder(path)  # it holds the name of .amygdala, which may be new


def undo(folder: ModelFolder, journal: Delta) -> None:
    """Bring back the state before the journal's change, then remove the journal.

    Raises CheckpointError, before anything is written, if that state would not come out, and
    OSError if the disk fails; the journal stays.
    """
    pieces = journal.pieces(folder)
    strange = [s.tensor for piece, s in pieces if _undone(folder, journal, piece, s) is None]
    if strange:
        raise CheckpointError(
            f"the change that was under way in {folder.path} cannot be undone: "
            f"{shortened(dict.fromkeys(strange))} has been written to by something else since. "
            f"Restore the folder from elsewhere, or keep it as it is: delete {journal.path}"
        )
    with ShardWriter() as writer:
        for piece, step in pieces:
            writer.write(piece, folder.read(piece), _undone(folder, journal, piece, step))
        writer.flush()
    remove(journal.path)


def _undone(folder: ModelFolder, journal: Delta, piece: Piece, step: Step) -> Data | None:
    content = folder.read(piece).copy()
    journal.encoded(step).apply(content)
    return content if digest(content) == step.after else None


class ShardWriter:
    """Writes pieces into the shards, in place, and counts the bytes; a context manager."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._open: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write(self, piece: Piece, old: Data, new: Data) -> None:
        """Write the blocks of a piece in which `new` differs from `old`, what it has on disk."""
        path = piece.tensor.path
        if path not in self._open:
            self._open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, self._open[path])
        # The runs are found before the first is written: `old` may be the file itself.
        for start, stop in runs(differing_blocks(old, new)):
            data = memoryview(new[start * BLOCK : stop * BLOCK])
            write_at(self._open[path], data, piece.offset + start * BLOCK)
            self.n_bytes += len(data)

    def flush(self) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)


def digest(content: Data) -> str:
    return sha256(content).hexdigest()


def differing_blocks(old: Data, new: Data) -> Bool[np.ndarray, " blocks"]:
    """Which blocks of 4 KB, counted from the start, differ; the last may be shorter."""
    whole = len(old) // BLOCK
    end = whole * BLOCK
    words = old[:end].view(np.uint64) != new[:end].view(np.uint64)
    blocks = np.zeros(-(-len(old) // BLOCK), dtype=bool)
    if words.any():
        blocks[:whole] = words.reshape(whole, -1).any(axis=1)
    if end < len(old):
        blocks[-1] = not np.array_equal(old[end:], new[end:])
    return blocks


def runs(blocks: Bool[np.ndarray, " blocks"]) -> Iterable[tuple[int, int]]:
    """The first block of each run of True and the one after its last."""
    edges = np.flatnonzero(np.diff(blocks, prepend=False, append=False)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)
