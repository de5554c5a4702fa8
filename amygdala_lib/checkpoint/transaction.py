"""Transactions: a folder goes from one state to another, whole or not at all.

1. Everything is compared and checked. Nothing has been written.
2. The delta that undoes the change is written to a temporary file, flushed, and renamed to be the
   journal. What it makes of the new bytes has been compared with the old ones, piece by piece.
3. The blocks that change are written into the shards, in place, and flushed.
4. The journal is renamed into the history: the change is made.

A process killed before the end of 2 leaves the old state; after 4 the new one; in between, whoever
opens the folder next applies the journal, and the old state is back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..artefacts import provenance
from ..errors import CheckpointError
from .checks import check_values_and_room, to_be_copied, unwritable
from .delta import DeltaWriter
from .difference import Difference
from .disk import copy, move, opened
from .encodings import Data, Encoded, encode
from .hashes import Hashes
from .history import next_entry, prune, warn_of_a_break
from .journal import (
    TEMPORARY,
    ShardWriter,
    bookkeeping,
    commit,
    digest,
    journal_path,
    recover,
)
from .parallel import each_piece
from .shards import ModelFolder, Piece
from .state import Source


@dataclass(frozen=True, eq=False)
class Change:
    """What a sync, a rollback or an applied delta has done; `id` is None if nothing differed.

    `parent` and `hash` are of the weights before and after. `shard_bytes` were written into the
    shards, `delta_bytes` into the journal that is now in the history; `encodings` has tensor, kind
    and bytes of each of its pieces. `copied` are the shards that the folder was first given copies
    of, and why. `seconds` are of each part.
    """

    id: int | None
    action: str
    difference: Difference
    parent: str | None = None
    hash: str | None = None
    shard_bytes: int = 0
    delta_bytes: int = 0
    encodings: list[tuple[str, str, int]] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """That of the difference, with the columns `encoding` and `delta_bytes`."""
        frame = self.difference.to_frame().assign(encoding="", delta_bytes=0)
        for name, kind, n_bytes in self.encodings:
            kinds = {*frame.at[name, "encoding"].split(), kind}
            frame.at[name, "encoding"] = " ".join(sorted(kinds))
            frame.at[name, "delta_bytes"] += n_bytes
        return frame

    def __str__(self) -> str:
        if self.id is None:
            return f"{self.action}: nothing to write. {self.difference}"
        copied = "".join(f"\n{shard} was copied first: {why}" for shard, why in self.copied.items())
        return (
            f"{self.action} {self.id}: {self.parent[:12]} -> {self.hash[:12]}, "
            f"{self.shard_bytes:,} bytes written in place, {self.delta_bytes:,} to undo them, in "
            f"{sum(self.seconds.values()):.2f} s{copied}\n{self.difference}"
        )


class Settings(NamedTuple):
    """How a change is made; `sync` has the same arguments."""

    unshare: bool = False
    allow_nonfinite: bool = False
    keep: int | None = None
    keep_bytes: int | None = None
    progress: bool = True


class Undoing(NamedTuple):
    """What turns a piece back, and its digests when it is new and old."""

    encoded: Encoded
    new: str
    old: str


def bring(
    folder: ModelFolder,
    source: Source,
    pieces: Sequence[Piece],
    action: str,
    facts: dict[str, Any],
    settings: Settings,
    *,
    problems: Sequence[str] = (),
    expected: str | None = None,
) -> Change:
    """Bring these pieces of a folder to what the source has. The caller holds the exclusive lock.

    `problems` are what the caller has found wrong; `expected` is the hash the weights must get.

    Raises CheckpointError with all that is wrong before anything is touched; and if writing fails:
    the folder is then as it was or, should the disk not even take that, will be when next opened.
    """
    if problems := [*problems, *unwritable(folder, settings.unshare)]:
        raise CheckpointError("\n".join(problems))
    tensors = list(folder.tensors.values())
    difference = Difference.between(folder, source, tensors, pieces, progress=settings.progress)
    if not difference:
        return Change(None, action, difference)
    changed = [change.piece for change in difference.changes]
    copied = to_be_copied(changed, source)
    check_values_and_room(difference, copied, settings.allow_nonfinite)

    seconds = {"compare": difference.seconds}
    with _timed(seconds, "hash"):
        hashes = Hashes.current(folder, progress=settings.progress)
        warn_of_a_break(folder.path, hashes.weights)
    record = provenance(
        action=action,
        time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        changed_bytes=sum(change.n_bytes for change in difference.changes),
        files=hashes.files,
        facts=facts,
    )
    with _as_it_was(folder.path):
        with _timed(seconds, "copy"):
            for shard in copied:
                _copy_in_place(shard)
        with _timed(seconds, "journal"):
            leaves, encodings = _write_journal(
                folder, source, changed, record, hashes, expected, settings.progress
            )
        with _timed(seconds, "write"):
            shard_bytes = _write_shards(folder, source, leaves, settings.progress)
            id, entry = _conclude(folder.path)
    after = hashes.after(leaves).stamped()
    with suppress(OSError):  # the change is made: without a record, the next one hashes more
        after.save()
    delta_bytes = entry.stat().st_size
    prune(folder.path, settings.keep, settings.keep_bytes)
    return Change(
        id,
        action,
        difference,
        parent=hashes.weights,
        hash=after.weights,
        shard_bytes=shard_bytes,
        delta_bytes=delta_bytes,
        encodings=encodings,
        copied={shard.name: why for shard, why in copied.items()},
        seconds=seconds,
    )


@contextmanager
def _as_it_was(path: Path) -> Iterator[None]:
    """If the block fails, the folder is put back to what it was before."""
    try:
        yield
    except BaseException as error:
        try:
            recover(path)
        except CheckpointError as failure:
            raise CheckpointError(f"{error or type(error).__name__}\n{failure}") from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} is as it was: writing failed ({error})") from error
        raise


def _copy_in_place(shard: Path) -> None:
    """Give the folder a file of its own in place of one that is shared."""
    temporary = bookkeeping(shard.parent) / f"{shard.name}{TEMPORARY}"
    copy(shard, temporary)
    move(temporary, shard)


def _write_journal(
    folder: ModelFolder,
    source: Source,
    pieces: Sequence[Piece],
    record: dict[str, Any],
    hashes: Hashes,
    expected: str | None,
    progress: bool,
) -> tuple[dict[Piece, str], list[tuple[str, str, int]]]:
    """Commit the journal; the leaves the pieces are to have, and tensor, kind, bytes of each."""

    def undoing(piece: Piece) -> Undoing:
        old, new = folder.read(piece), source.read(piece).copy()
        encoded = encode(new, old, piece.tensor.dtype.itemsize)
        leaf = digest(new)
        encoded.apply(new)
        if not np.array_equal(new, old):
            raise CheckpointError(
                f"the change of {piece.tensor.name} cannot be undone by its own delta: please "
                "report this. Nothing was written"
            )
        return Undoing(encoded, leaf, digest(old))

    temporary = journal_path(folder.path).with_suffix(TEMPORARY)
    leaves: dict[Piece, str] = {}
    encodings = []
    with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        writer = DeltaWriter(descriptor, pieces, record)
        for piece, found in each_piece(undoing, pieces, "journal", progress):
            if found.old != hashes.leaves[piece.tensor.name][piece.index]:
                raise CheckpointError(
                    f"{piece.tensor.path} has changed, with no trace of a write: its disk may be "
                    "failing. `amygdala verify` says what differs. Nothing was written"
                )
            writer.add(piece, found.encoded, found.new, found.old)
            leaves[piece] = found.new
            encodings.append((piece.tensor.name, found.encoded.kind, len(found.encoded.payload)))
        result = hashes.after(leaves).weights
        if expected not in (None, result):
            raise CheckpointError(
                f"{folder.path} would come to be {result[:12]}, not {expected[:12]}: a delta is "
                "damaged. Nothing was written"
            )
        writer.finish(applies_to=result, results_in=hashes.weights)
    commit(temporary, folder.path)
    return leaves, encodings


def _write_shards(
    folder: ModelFolder, source: Source, leaves: dict[Piece, str], progress: bool
) -> int:
    """Write the pieces, if they still are what the journal is of; the number of bytes written."""

    def snapshot(piece: Piece) -> Data:
        new = source.read(piece).copy()
        if digest(new) != leaves[piece]:
            raise CheckpointError(
                f"{piece.tensor.name} changed while it was being written: pause training for as "
                f"long as a sync takes. {folder.path} is as it was"
            )
        return new

    with ShardWriter() as writer:
        for piece, new in each_piece(snapshot, list(leaves), "write", progress):
            writer.write(piece, folder.read(piece), new)
        writer.flush()
    return writer.n_bytes


def _conclude(path: Path) -> tuple[int, Path]:
    """The change is made: its journal becomes an entry of the history."""
    id, entry = next_entry(path)
    try:
        move(journal_path(path), entry)
    except OSError as error:
        if journal_path(path).exists():
            raise
        raise CheckpointError(
            f"change {id} of {path} is written, but the disk does not confirm it ({error}): should "
            "the machine stop now, it may be undone"
        ) from error
    return id, entry


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start
