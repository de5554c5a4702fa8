"""History: the states a folder has been in, and the deltas that lead back to them."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..errors import CheckpointError
from .access import reading
from .delta import Delta
from .disk import flush_folder, remove
from .hashes import Hashes
from .journal import bookkeeping
from .shards import ModelFolder


class Entry(NamedTuple):
    """A change that was made; `delta` undoes it."""

    id: int
    delta: Delta

    @property
    def parent(self) -> str:
        """Hash of the weights before the change."""
        return self.delta.results_in

    @property
    def hash(self) -> str:
        return self.delta.applies_to


def entries(path: Path) -> list[Entry]:
    """All that are kept, oldest first. Raises CheckpointError if one is damaged."""
    return [Entry(int(file.stem), Delta.open(file)) for file in _files(path)]


def reachable(found: list[Entry], current: str) -> list[Entry]:
    """The newest entries that lead back, one by one, from the state `current`."""
    chain: list[Entry] = []
    for entry in reversed(found):
        if entry.hash != current or (chain and entry.id != chain[-1].id - 1):
            break
        chain.append(entry)
        current = entry.parent
    return chain[::-1]


def history(folder: Path | str, *, wait: float = 0, progress: bool = True) -> pd.DataFrame:
    """The states a folder has been in, oldest first: a row per state, `id` is its index.

    Columns: `time` (UTC) and `action` that led to it, `parent` and `hash` of the weights, `bytes`
    of the delta that undoes it, `changed_bytes` of the weights, `facts` as they were given, and
    `reachable`: whether `rollback` can bring it back. The first row is the state before the oldest
    change kept; a folder that was never synced has none.

    Raises CheckpointError if an entry is damaged, or the folder is being written to.
    """
    with reading(folder, wait=wait) as path:
        found = entries(path)
        current = found and Hashes.current(ModelFolder.open(path), progress=progress).weights
    rows = [_row(entry) for entry in found]
    if found:
        rows = [{"id": found[0].id - 1, "action": "start", "hash": found[0].parent}, *rows]
        way_back = reachable(found, current)
        within = {entry.id for entry in way_back} | {entry.id - 1 for entry in way_back}
        for row in rows:
            row["reachable"] = row["id"] in within or row["hash"] == current
    columns = ["id", "time", "action", "parent", "hash", "bytes", "changed_bytes", "facts"]
    frame = pd.DataFrame(rows, columns=[*columns, "reachable"]).set_index("id")
    return frame.astype({"bytes": "Int64", "changed_bytes": "Int64", "reachable": bool})


def find(found: list[Entry], to: int | str) -> tuple[int, str]:
    """The id and hash of the state `to`: an id, or the start of a hash.

    Raises CheckpointError if there is none, or several.
    """
    states = {entry.id: entry.hash for entry in found}
    if found:
        states = {found[0].id - 1: found[0].parent, **states}
    if isinstance(to, Integral):
        fitting = [int(to)] if to in states else []
    else:
        fitting = [id for id, hash in states.items() if to and hash.startswith(to)]
    if not fitting or len({states[id] for id in fitting}) > 1:
        known = ", ".join(f"{id} ({hash[:12]})" for id, hash in states.items()) or "none"
        raise CheckpointError(f"{to!r} is not one state of this folder: there are {known}")
    return fitting[-1], states[fitting[-1]]


def next_entry(path: Path) -> tuple[int, Path]:
    """The id of the next entry, and where its delta goes."""
    folder = bookkeeping(path) / "history"
    if not folder.exists():
        os.mkdir(folder, mode=0o700)
        flush_folder(folder.parent)
    id = max((int(file.stem) for file in _files(path)), default=0) + 1
    return id, folder / f"{id:06d}.safetensors"


def prune(path: Path, keep: int | None, keep_bytes: int | None) -> None:
    """Drop the oldest entries: at most `keep` stay, and at most `keep_bytes` bytes of them."""
    taken = 0
    for number, file in enumerate(reversed(_files(path)), 1):
        taken += file.stat().st_size
        if (keep is not None and number > keep) or (keep_bytes is not None and taken > keep_bytes):
            with suppress(OSError):  # the change is made; the next one prunes again
                remove(file)


def warn_of_a_break(path: Path, current: str) -> None:
    """Say so if the folder is not in the state that its newest entry led to."""
    last = newest(path)
    if last is not None and last.applies_to != current:
        warnings.warn(
            f"something else has changed {path} since its last sync: rollback will reach back to "
            "the state it is in now, and no further",
            stacklevel=2,
        )


def newest(path: Path) -> Delta | None:
    """The delta that undoes the last change kept."""
    files = _files(path)
    return Delta.open(files[-1]) if files else None


def _files(path: Path) -> list[Path]:
    return sorted((bookkeeping(path) / "history").glob("[0-9]*.safetensors"))


def _row(entry: Entry) -> dict:
    told = ("time", "action", "changed_bytes", "facts")
    return {
        "id": entry.id,
        **{name: entry.delta.record.get(name) for name in told},
        "parent": entry.parent,
        "hash": entry.hash,
        "bytes": entry.delta.n_bytes,
    }
