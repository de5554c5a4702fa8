"""The safetensors shards of a model folder: where each tensor lies, and its bytes by the piece."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import CheckpointError
from .encodings import Data

PIECE = 4 << 20
"""Bytes that are compared, hashed, encoded and written together, counted from a tensor's start."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `n_bytes` bytes from `offset` of the file `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int

    def pieces(self) -> list[Piece]:
        return [Piece(self, index) for index in range(-(-self.n_bytes // PIECE))]


class Piece(NamedTuple):
    """`PIECE` bytes of a tensor, or what is left of it."""

    tensor: StoredTensor
    index: int

    @property
    def start(self) -> int:
        return self.index * PIECE

    @property
    def n_bytes(self) -> int:
        return min(PIECE, self.tensor.n_bytes - self.start)

    @property
    def offset(self) -> int:
        """Of its first byte, in the file."""
        return self.tensor.offset + self.start


@dataclass(frozen=True, eq=False)
class Header:
    """What a safetensors file says of itself; `digest` is of the header's bytes."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    digest: str

    @classmethod
    def read(cls, path: Path) -> Header:
        """Raises CheckpointError for a file that is not whole, or of a dtype that has no bytes."""
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                    raise ValueError(f"{size} bytes cannot hold a header of {length}")
                text = file.read(length)
            content = json.loads(text)
            metadata = content.pop("__metadata__", None) or {}
            tensors = {
                name: _stored(name, entry, path, 8 + length) for name, entry in content.items()
            }
            _check_layout(tensors.values(), 8 + length, size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}): save or download it again"
            ) from error
        return cls(tensors, metadata, sha256(text).hexdigest())


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """The tensors of a model folder, by name, and the headers of its shards, by file name."""

    path: Path
    tensors: dict[str, StoredTensor]
    headers: dict[str, Header]

    @classmethod
    def open(cls, path: Path | str) -> ModelFolder:
        """Read the headers of `model.safetensors`, or of the shards its index names.

        Raises CheckpointError, with all that is wrong, if this is no model folder, a shard is
        damaged, or the index does not fit the shards.
        """
        path = resolved(path)
        listed = listed_shards(path)
        headers, problems = {}, []
        for shard in sorted(set(listed.values())) if listed else [SINGLE]:
            try:
                headers[shard] = Header.read(path / shard)
            except CheckpointError as error:
                problems.append(str(error))
        held = [(name, shard) for shard, header in headers.items() for name in header.tensors]
        if listed:
            problems += _misfits(listed, held, headers)
        if problems:
            raise CheckpointError("\n".join(problems))
        return cls(path, {name: headers[shard].tensors[name] for name, shard in held}, headers)

    @classmethod
    def of_file(cls, path: Path | str) -> ModelFolder:
        """One safetensors file, whatever its name, as if it were a folder's only shard."""
        path = resolved(path)
        header = Header.read(path)
        return cls(path.parent, header.tensors, {path.name: header})

    @property
    def shards(self) -> list[Path]:
        return [self.path / name for name in self.headers]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    def pieces(self) -> Iterator[Piece]:
        for tensor in self.tensors.values():
            yield from tensor.pieces()

    def read(self, piece: Piece) -> Data:
        """The bytes of a piece as they are on disk, mapped for as long as the array lives."""
        skew = piece.offset % mmap.ALLOCATIONGRANULARITY
        with piece.tensor.path.open("rb", buffering=0) as file:
            mapped = mmap.mmap(
                file.fileno(),
                skew + piece.n_bytes,
                access=mmap.ACCESS_READ,
                offset=piece.offset - skew,
            )
        return np.frombuffer(mapped, np.uint8, piece.n_bytes, skew)


def resolved(path: Path | str) -> Path:
    return Path(path).expanduser().resolve()


def shortened(names: Iterable[str], most: int = 8) -> str:
    """Names for an error message, which may be thousands."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _stored(name: str, entry: dict, path: Path, start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} and lies at {begin} to {end}")
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, which do not make {shape} {dtype}")
    return StoredTensor(name, dtype, shape, path, start + begin, end - begin)


def _check_layout(tensors: Iterable[StoredTensor], start: int, size: int) -> None:
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != start:
            raise ValueError(f"{tensor.name} begins at byte {tensor.offset}, not {start}")
        start += tensor.n_bytes
    if start != size:
        raise ValueError(f"it has {size} bytes, its header speaks of {start}")


def listed_shards(path: Path) -> dict[str, str]:
    """The shard of each tensor by the index; empty if there is a single file and no index."""
    index, single = path / INDEX, path / SINGLE
    if not index.exists():
        if single.exists():
            return {}
        others = sorted(found.name for found in path.glob("*.safetensors"))
        raise CheckpointError(
            f"{path} is no model folder: it has neither {SINGLE} nor {INDEX} "
            f"(safetensors here: {shortened(others) or 'none'}). Give the folder that "
            "save_pretrained wrote"
        )
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        strange = sorted(name for name in set(listed.values()) if Path(name).name != name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): save the model again") from error
    if strange or not listed:
        raise CheckpointError(
            f"{index} names {shortened(strange) or 'no shard'}: shards are files of its own folder"
        )
    if single.exists() and SINGLE not in listed.values():
        raise CheckpointError(
            f"{path} has both {SINGLE} and {INDEX}, which does not name it: transformers would "
            "load the first. Delete the one that is out of date"
        )
    return listed


def _misfits(
    listed: dict[str, str], held: list[tuple[str, str]], headers: dict[str, Header]
) -> list[str]:
    readable = {(name, shard) for name, shard in listed.items() if shard in headers}
    absent, unlisted = sorted(readable - set(held)), sorted(set(held) - readable)
    problems = []
    if absent:
        places = (f"{name} in {shard}" for name, shard in absent)
        problems.append(f"{INDEX} names tensors that are not there: {shortened(places)}")
    if unlisted:
        places = (f"{name} in {shard}" for name, shard in unlisted)
        problems.append(f"{INDEX} does not name, or has elsewhere: {shortened(places)}")
    return problems
