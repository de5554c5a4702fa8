"""Rollback: bring back a state the folder has been in, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artefacts import as_json
from ..errors import CheckpointError
from .access import writing
from .hashes import Hashes
from .history import Entry, entries, find, reachable
from .shards import ModelFolder
from .state import DeltaSource
from .transaction import Change, Settings, bring


def rollback(
    folder: Path | str,
    to: int | str,
    *,
    unshare: bool = False,
    wait: float = 0,
    progress: bool = True,
    **facts: Any,
) -> Change:
    """Bring back the state `to`: an id of `history`, or the start of a hash.

    This is a change like any other: journaled, recorded, and undone by another rollback. That the
    weights come out with the hash they had is checked before anything is written. `unshare`, `wait`
    and `facts` are as for `sync`.

    Raises CheckpointError if there is no such state, something else has changed the folder since,
    an entry is damaged, or as `sync` does.
    """
    as_json(facts)
    with writing(folder, wait=wait) as path:
        opened = ModelFolder.open(path)
        found = entries(path)
        id, hash = find(found, to)
        back = way_back(opened, found, id, hash, progress)
        source = DeltaSource.of(opened, [entry.delta for entry in back])
        settings = Settings(unshare, allow_nonfinite=True, progress=progress)
        facts = {"to": id, **facts}
        pieces = list(source.steps)
        return bring(opened, source, pieces, "rollback", facts, settings, expected=hash)


def way_back(
    folder: ModelFolder, found: list[Entry], id: int, hash: str, progress: bool
) -> list[Entry]:
    """The entries to undo, newest first, to come from the present state to an earlier one.

    Raises CheckpointError if they do not lead there.
    """
    current = Hashes.current(folder, progress=progress).weights
    if current == hash:
        return []
    back = [entry for entry in reachable(found, current) if entry.id > id]
    if not back or back[0].parent != hash:
        raise CheckpointError(
            f"no way back to state {id} ({hash[:12]}): something else has changed {folder.path} "
            f"since, to {current[:12]}. `amygdala history` says what can be reached"
        )
    return back[::-1]
