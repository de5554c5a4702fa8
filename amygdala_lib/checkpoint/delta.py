"""Delta files: what turns one state of a folder into another, with where it comes from.

One format serves as undo journal, as history and for export: safetensors, so that anything can list
it, with a tensor of payload bytes for each piece that changed, and a JSON record in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .disk import opened, write_at
from .encodings import Encoded
from .shards import Header, ModelFolder, Piece

FORMAT = "amygdala delta 1"
_UNKNOWN = "0" * 64  # as long as a digest


class Step(NamedTuple):
    """What happens to one piece: SHA-256 of its bytes `before` and `after` the delta is applied."""

    tensor: str
    index: int
    before: str
    after: str

    @property
    def key(self) -> str:
        return f"{self.tensor}#{self.index}"


class DeltaWriter:
    """Writes a delta file payload by payload, so that it need not fit into memory.

    The header of a safetensors file stands before the payloads, but is known after them. So room
    is left for the longest it can become; spaces fill what is too much.
    """

    def __init__(self, descriptor: int, pieces: Iterable[Piece], facts: dict[str, Any]):
        self._descriptor, self._facts = descriptor, facts
        self._steps: list[Step] = []
        self._sizes: list[int] = []
        pieces = list(pieces)
        steps = [Step(p.tensor.name, p.index, _UNKNOWN, _UNKNOWN) for p in pieces]
        longest = self._header(steps, [10**15] * len(steps), _UNKNOWN, _UNKNOWN)
        self._room = -(-len(longest) // 8) * 8
        self.n_bytes = 8 + self._room

    def add(self, piece: Piece, encoded: Encoded, before: str, after: str) -> None:
        write_at(self._descriptor, encoded.payload, self.n_bytes)
        self._steps.append(Step(piece.tensor.name, piece.index, before, after))
        self._sizes.append(len(encoded.payload))
        self.n_bytes += len(encoded.payload)

    def finish(self, applies_to: str, results_in: str) -> None:
        """Write the header and flush. The states are told by the hashes of their weights."""
        header = self._header(self._steps, self._sizes, applies_to, results_in)
        start = self._room.to_bytes(8, "little") + header.ljust(self._room)
        write_at(self._descriptor, start, 0)
        os.fsync(self._descriptor)

    def _header(
        self, steps: list[Step], sizes: list[int], applies_to: str, results_in: str
    ) -> bytes:
        ends = {"applies_to": applies_to, "results_in": results_in}
        record = json.dumps({"format": FORMAT, **ends, **self._facts, "steps": steps})
        metadata = {"record": record, "sha256": sha256(record.encode()).hexdigest()}
        header: dict[str, Any] = {"__metadata__": metadata}
        start = 0
        for step, size in zip(steps, sizes, strict=True):
            stop = start + size
            header[step.key] = {"dtype": "U8", "shape": [size], "data_offsets": [start, stop]}
            start = stop
        return json.dumps(header).encode()


@dataclass(frozen=True, eq=False)
class Delta:
    """A delta file that has been opened; its payloads stay on disk."""

    path: Path
    record: dict[str, Any]
    steps: list[Step]
    header: Header

    @classmethod
    def open(cls, path: Path) -> Delta:
        """Raises CheckpointError if the file is damaged or is no delta."""
        header = Header.read(path)
        text = header.metadata.get("record", "")
        try:
            if sha256(text.encode()).hexdigest() != header.metadata.get("sha256"):
                raise ValueError("its checksum does not match")
            record = json.loads(text)
            steps = [Step(*step) for step in record.pop("steps")]
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']}, and this reads {FORMAT}")
            if {step.key for step in steps} != header.tensors.keys():
                raise ValueError("it lacks payloads")
            if lacking := {"applies_to", "results_in", "facts"} - record.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no delta, or a damaged one: {error}") from error
        return cls(path, record, steps, header)

    @property
    def applies_to(self) -> str:
        return self.record["applies_to"]

    @property
    def results_in(self) -> str:
        return self.record["results_in"]

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size

    def encoded(self, step: Step) -> Encoded:
        stored = self.header.tensors[step.key]
        with opened(self.path, os.O_RDONLY) as descriptor:
            return Encoded(os.pread(descriptor, stored.n_bytes, stored.offset))

    def pieces(self, folder: ModelFolder) -> list[tuple[Piece, Step]]:
        """The pieces of `folder` it changes. Raises CheckpointError if the folder lacks one."""
        found, absent = [], []
        for step in self.steps:
            stored = folder.tensors.get(step.tensor)
            if stored is None or step.index not in range(len(stored.pieces())):
                absent.append(step.key)
            else:
                found.append((Piece(stored, step.index), step))
        if absent:
            raise CheckpointError(
                f"{self.path} changes {absent[0]} and {len(absent) - 1} more pieces that "
                f"{folder.path} does not have: it was made for another model"
            )
        return found
