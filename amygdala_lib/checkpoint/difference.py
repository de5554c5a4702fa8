"""Differences: which bytes of a folder are not those of a state, tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from ..errors import CheckpointError
from .access import reading
from .encodings import BLOCK, Data
from .journal import differing_blocks
from .parallel import each_piece
from .shards import ModelFolder, Piece, StoredTensor, resolved
from .state import Names, Source, State, source_of

_COUNTED = [
    *("bytes", "changed_bytes", "blocks", "changed_blocks"),
    *("elements", "changed_elements"),
]
_COLUMNS = ["dtype", "shape", *_COUNTED, "largest_change"]
_SHOWN = 12


class PieceChange(NamedTuple):
    """How much of a piece changes; `largest` is the largest |change| of a floating-point element.

    `largest` is NaN for integers, and infinite if a value that is not finite goes or comes;
    `nonfinite` counts the elements that come to be infinite or NaN.
    """

    piece: Piece
    n_bytes: int
    blocks: int
    elements: int
    largest: float
    nonfinite: int


@dataclass(frozen=True, eq=False)
class Difference:
    """What would have to change in a folder for it to hold a state.

    `tensors` are those compared; `changes` are of the pieces that differ, in the folder's order.
    """

    path: Path
    tensors: list[StoredTensor]
    changes: list[PieceChange]
    seconds: float

    @classmethod
    def between(
        cls,
        folder: ModelFolder,
        source: Source,
        tensors: Sequence[StoredTensor],
        pieces: Sequence[Piece] | None = None,
        *,
        progress: bool,
    ) -> Difference:
        """Compare tensors of a folder with a source; only in `pieces`, where others are known."""
        if pieces is None:
            pieces = [piece for tensor in tensors for piece in tensor.pieces()]

        def compared(piece: Piece) -> PieceChange | None:
            return compare(piece, folder.read(piece), source.read(piece))

        start = time.perf_counter()
        found = each_piece(compared, pieces, "compare", progress)
        changes = [change for _, change in found if change is not None]
        return cls(folder.path, list(tensors), changes, time.perf_counter() - start)

    def __bool__(self) -> bool:
        return bool(self.changes)

    def to_frame(self) -> pd.DataFrame:
        """A row per tensor: dtype, shape, and of bytes, blocks and elements, all and changed.

        Blocks are of 4 KB, counted from the tensor's start. `largest_change` is the largest
        |change| of an element: 0 where nothing changed, NaN for integers.
        """
        rows = {
            tensor.name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tensor.shape,
                "bytes": tensor.n_bytes,
                "changed_bytes": 0,
                "blocks": -(-tensor.n_bytes // BLOCK),
                "changed_blocks": 0,
                "elements": tensor.n_bytes // tensor.dtype.itemsize,
                "changed_elements": 0,
                "largest_change": 0.0,
            }
            for tensor in self.tensors
        }
        for change in self.changes:
            row = rows[change.piece.tensor.name]
            row["changed_bytes"] += change.n_bytes
            row["changed_blocks"] += change.blocks
            row["changed_elements"] += change.elements
            row["largest_change"] = max(change.largest, row["largest_change"])
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=_COLUMNS)
        return frame.rename_axis("tensor")

    def total(self) -> dict[str, float]:
        """The sums over all tensors, and the largest change of any."""
        frame = self.to_frame()
        counts = {name: int(frame[name].sum()) for name in _COUNTED}
        return counts | {"largest_change": float(frame["largest_change"].max())}

    def __str__(self) -> str:
        total = self.total()
        if not self:
            return f"{self.path}: all {total['bytes']:,} bytes are the same"
        frame = self.to_frame()
        frame = frame[frame["changed_bytes"] > 0].sort_values("changed_bytes", ascending=False)
        shown = frame.head(_SHOWN)[
            ["dtype", "bytes", "changed_bytes", "changed_blocks", "changed_elements"]
            + ["largest_change"]
        ]
        more = f"\nand {len(frame) - _SHOWN} more tensors" if len(frame) > _SHOWN else ""
        share = total["changed_bytes"] / total["bytes"]
        return (
            f"{self.path}: {total['changed_bytes']:,} of {total['bytes']:,} bytes differ "
            f"({share:.2%}), in {total['changed_blocks']:,} of {total['blocks']:,} blocks and "
            f"{len(frame)} of {len(self.tensors)} tensors; largest change "
            f"{total['largest_change']:.3g}\n{shown.to_string()}{more}"
        )


def diff(
    folder: Path | str,
    state: State,
    *,
    names: Names | None = None,
    partial: bool = False,
    wait: float = 0,
    progress: bool = True,
) -> Difference:
    """Which bytes of a model folder are not those of `state`.

    `state` is a mapping of names to tensors (any device; views are welcome), a model, or another
    model folder or safetensors file. `names` maps its names to the folder's, or to None for what is
    to be left out; a transformers model's are first turned into those it would be saved with.
    `partial` allows the folder to have tensors that `state` lacks.

    Nothing is copied but what lies on another device, and that piece by piece. (Of a mixture of
    experts, transformers makes copies to take fused experts apart; pass views to save these.)

    Raises CheckpointError, with all that is wrong, if the state does not fit the folder, or the
    folder is being written to (see `reading`).
    """
    with reading(folder, wait=wait) as path, read_from(state, wait):
        opened = ModelFolder.open(path)
        source, tensors, problems = source_of(opened, state, names, partial)
        if problems:
            raise CheckpointError("\n".join(problems))
        return Difference.between(opened, source, tensors, progress=progress)


def read_from(state: State, wait: float) -> AbstractContextManager:
    """Within it, nobody writes to `state`, if that is a folder."""
    if isinstance(state, Path | str) and resolved(state).is_dir():
        return reading(state, wait=wait)
    return nullcontext()


def compare(piece: Piece, old: Data, new: Data) -> PieceChange | None:
    """How much of a piece changes; None if nothing does."""
    if not differing_blocks(old, new).any():
        return None
    new = new.copy()  # it may be live memory, and the figures must be of one and the same state
    blocks = int(np.count_nonzero(differing_blocks(old, new)))
    if blocks == 0:
        return None
    dtype = piece.tensor.dtype
    before, after = (data.view(f"u{dtype.itemsize}") for data in (old, new))
    differs = before != after
    n_bytes, elements = int(np.count_nonzero(old != new)), int(np.count_nonzero(differs))
    largest, nonfinite = float("nan"), 0
    if dtype.is_floating_point:
        before, after = (_values(data[differs], dtype) for data in (before, after))
        largest = (after - before).abs().nan_to_num(nan=torch.inf).max().item()
        nonfinite = int((~after.isfinite()).sum())
    return PieceChange(piece, n_bytes, blocks, elements, largest, nonfinite)


def _values(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    values = torch.from_numpy(bits.view(np.uint8)).view(dtype)
    return values if dtype in (torch.float32, torch.float64) else values.float()
