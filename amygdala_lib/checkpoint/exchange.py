"""Exchange: take a change from one copy of a model to another, as one small file."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..artefacts import as_json, provenance, replacing
from ..errors import CheckpointError
from .access import reading, writing
from .delta import Delta, DeltaWriter
from .disk import opened
from .encodings import Encoded, encode
from .hashes import Hashes
from .history import entries, find
from .journal import digest
from .parallel import each_piece
from .rollback import way_back
from .shards import ModelFolder, Piece, resolved
from .state import DeltaSource
from .transaction import Change, Settings, bring


def export_delta(
    folder: Path | str,
    to_file: Path | str,
    *,
    since: int | str | None = None,
    wait: float = 0,
    progress: bool = True,
    **facts: Any,
) -> Delta:
    """Write what turns the state `since` into the present one to a safetensors file.

    `since` is an id of `history` or the start of a hash; by default, the state before the last
    change. The values are told relative to that state, so the file is of use only to who has it.

    Raises CheckpointError if there is no such state, or no way back to it.
    """
    as_json(facts)
    with reading(folder, wait=wait) as path:
        folder = ModelFolder.open(path)
        found = entries(path)
        if since is None and not found:
            raise CheckpointError(f"{path} has no history: there is no change to export")
        id, hash = find(found, found[-1].id - 1 if since is None else since)
        back = way_back(folder, found, id, hash, progress)
        source = DeltaSource.of(folder, [entry.delta for entry in back])
        hashes = Hashes.current(folder)

        def encoded(piece: Piece) -> tuple[Encoded, str]:
            old, itemsize = source.read(piece), piece.tensor.dtype.itemsize
            return encode(old, folder.read(piece), itemsize, relative=True), digest(old)

        record = provenance(
            action="delta",
            time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            files=hashes.files,
            facts=facts,
        )
        pieces = list(source.steps)
        try:
            with (
                replacing(resolved(to_file)) as temporary,
                opened(temporary, os.O_WRONLY) as descriptor,
            ):
                writer = DeltaWriter(descriptor, pieces, record)
                for piece, (change, before) in each_piece(encoded, pieces, "export", progress):
                    writer.add(piece, change, before, hashes.leaves[piece.tensor.name][piece.index])
                writer.finish(applies_to=hash, results_in=hashes.weights)
        except OSError as error:
            raise CheckpointError(f"{to_file} could not be written: {error}") from error
    return Delta.open(resolved(to_file))


def apply_delta(
    folder: Path | str,
    file: Path | str,
    *,
    unshare: bool = False,
    keep: int | None = 10,
    keep_bytes: int | None = None,
    wait: float = 0,
    progress: bool = True,
    **facts: Any,
) -> Change:
    """Apply what `export_delta` wrote to a folder with the same weights as those it was made from.

    How these are cut into shards does not matter. That the weights come out as they should is
    checked before anything is written. The arguments are as for `sync`; the delta's own facts are
    recorded too.

    Raises CheckpointError if the file is damaged, the folder's weights are others, or as `sync`.
    """
    as_json(facts)
    with writing(folder, wait=wait) as path:
        opened_folder = ModelFolder.open(path)
        delta = Delta.open(resolved(file))
        current = Hashes.current(opened_folder, progress=progress).weights
        if current not in (delta.applies_to, delta.results_in):
            raise CheckpointError(
                f"{delta.path} applies to weights {delta.applies_to[:12]}, but {path} has "
                f"{current[:12]}: roll it back, or take a copy of the model it was made from"
            )
        source = DeltaSource.of(opened_folder, [delta] if current == delta.applies_to else [])
        settings = Settings(unshare, True, keep, keep_bytes, progress)
        return bring(
            opened_folder,
            source,
            list(source.steps),
            "apply",
            delta.record["facts"] | facts,
            settings,
            expected=delta.results_in,
        )
