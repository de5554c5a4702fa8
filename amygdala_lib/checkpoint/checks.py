"""Checks: what must hold before a byte is written, and which files must be copied first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import CheckpointError
from .difference import Difference
from .disk import opened
from .encodings import BLOCK
from .journal import bookkeeping
from .mappings import mapped_by
from .shards import ModelFolder, Piece, shortened
from .state import Source

_SPARE = 16 << 20
"""Bytes to be left free on the disk, besides what a change takes."""


def unwritable(folder: ModelFolder, unshare: bool) -> list[str]:
    """Why the shards cannot or should not be written to."""
    linked = {shard for shard in folder.shards if _shared_with(shard)}
    problems = []
    if linked and not unshare:
        shares = (f"{shard.name} ({_shared_with(shard)})" for shard in sorted(linked))
        problems.append(
            f"in {folder.path}, other names share the bytes of {shortened(shares)}, and would "
            "change too. unshare=True gives the folder copies of its own first"
        )
    for shard in folder.shards:
        if shard in linked and unshare:
            continue
        try:
            with opened(shard, os.O_WRONLY):
                pass
        except OSError as error:
            problems.append(f"{shard} cannot be written to: {error.strerror}")
    return problems


def _shared_with(shard: Path) -> str:
    """What else has the bytes of a file; empty if nothing has."""
    if shard.is_symlink():
        return f"a link to {shard.resolve()}"
    links = shard.stat().st_nlink
    return f"one of {links} hard links" if links > 1 else ""


def to_be_copied(changed: Sequence[Piece], source: Source) -> dict[Path, str]:
    """Shards that something else has too and must not see changed, with the reason."""
    tensors = {piece.tensor for piece in changed}
    mapped, reasons = mapped_by(tensors, source), {}
    for shard in sorted({tensor.path for tensor in tensors}):
        if why := _shared_with(shard):
            reasons[shard] = why
        elif shard in mapped:
            reasons[shard] = f"mapped into memory by process {shortened(map(str, mapped[shard]))}"
    return reasons


def check_values_and_room(
    difference: Difference, copied: Iterable[Path], allow_nonfinite: bool
) -> None:
    problems = []
    nonfinite: dict[str, int] = {}
    for change in difference.changes:
        if change.nonfinite:
            name = change.piece.tensor.name
            nonfinite[name] = nonfinite.get(name, 0) + change.nonfinite
    if nonfinite and not allow_nonfinite:
        counts = shortened(f"{count} in {name}" for name, count in nonfinite.items())
        problems.append(
            f"values that are infinite or not a number: {counts}. Find out where they come from; "
            "allow_nonfinite=True writes them"
        )
    # At worst a delta has the old blocks as they are. Its record takes some 300 bytes a piece.
    needed = sum(
        min(change.blocks * BLOCK, change.piece.n_bytes) + 1000 for change in difference.changes
    )
    needed += sum(shard.stat().st_size for shard in copied)
    free = shutil.disk_usage(difference.path).free
    if needed + _SPARE > free:
        problems.append(
            f"{needed / 1e6:,.1f} MB are needed on the disk of {difference.path} for the journal "
            f"and copies, and {_SPARE / 1e6:.0f} MB to spare; {free / 1e6:,.1f} MB are free. Make "
            f"room; old entries of the history are in {bookkeeping(difference.path)}"
        )
    if problems:
        raise CheckpointError("\n".join(problems))
