"""Sync: write into a model folder what has changed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artefacts import as_json
from .access import writing
from .difference import read_from
from .shards import ModelFolder
from .state import Names, State, source_of
from .transaction import Change, Settings, bring


def sync(
    folder: Path | str,
    state: State,
    *,
    names: Names | None = None,
    partial: bool = False,
    unshare: bool = False,
    allow_nonfinite: bool = False,
    keep: int | None = 10,
    keep_bytes: int | None = None,
    wait: float = 0,
    progress: bool = True,
    **facts: Any,
) -> Change:
    """Bring a model folder to `state`, in place, writing only the blocks of 4 KB that change.

    A kill, a full disk or a power cut at any moment leaves the old state or the new one, never a
    mixture: what was half written is undone by whatever of this package opens the folder next. Who
    may read meanwhile, and what they see: `reading`. Afterwards `rollback` can bring back what was
    there before.

    `state`, `names` and `partial` are as for `diff`. `unshare` is for folders that share files with
    others (the Hugging Face cache; hard links): shards that change are first replaced by copies of
    the folder's own; without it they are refused. (A shard that a model has mapped into memory is
    copied without asking, see `reading`.) `allow_nonfinite` also writes infinities and NaN. Of the
    history, the `keep` newest changes are kept, and at most `keep_bytes` bytes; None is no limit.
    `wait` is how many seconds to wait for others to finish. `facts` (job, loss, parameters) go into
    the history as they are.

    The first sync of a folder hashes all of it; later ones only what they change.

    Raises CheckpointError with all that is wrong, before a byte is written: names, shapes or dtypes
    that do not fit (nothing is cast), files that are read-only or shared, too little room, values
    that are not finite, somebody else at work. ArtefactError for facts that JSON cannot hold.
    """
    as_json(facts)
    with writing(folder, wait=wait) as path, read_from(state, wait):
        opened = ModelFolder.open(path)
        source, tensors, problems = source_of(opened, state, names, partial)
        pieces = [piece for tensor in tensors for piece in tensor.pieces()]
        settings = Settings(unshare, allow_nonfinite, keep, keep_bytes, progress)
        return bring(opened, source, pieces, "sync", facts, settings, problems=problems)
