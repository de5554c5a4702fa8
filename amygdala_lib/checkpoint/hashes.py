"""Hashes: what a folder holds, piece by piece, so that hashing a change costs what the change does.

A leaf is the SHA-256 of a piece of a tensor; the root is over names, dtypes, shapes and leaves. How
the tensors are cut into shards does not enter. Leaves are recorded together with each shard's size,
time of change, inode and header: a shard that something else has written to is hashed anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .disk import move, opened, write_at
from .journal import TEMPORARY, bookkeeping, digest
from .parallel import each_piece
from .shards import INDEX, PIECE, ModelFolder, Piece

_MODEL_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
"""Suffixes of what makes a model besides its weights: configuration, tokenizer, code."""


@dataclass(frozen=True, eq=False)
class Hashes:
    """Leaves of every tensor, stamps of the shards, and SHA-256 of the model's other files."""

    folder: ModelFolder
    leaves: dict[str, list[str]]
    stamps: dict[str, list]
    files: dict[str, str]

    @classmethod
    def computed(cls, folder: ModelFolder, *, progress: bool = False) -> Hashes:
        """Of all bytes as they are now."""
        return _completed(cls(folder, {}, {}, _files(folder.path)), _stamps(folder), progress)

    @classmethod
    def recorded(cls, folder: ModelFolder) -> Hashes | None:
        """As they were when last computed; None if there is no record, or a damaged one."""
        try:
            with safe_open(_record(folder.path), framework="np") as file:
                told = {name: json.loads(text) for name, text in file.metadata().items()}
                leaves = {name: _hex(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            same = told["piece"] == PIECE
            return cls(folder, leaves, told["stamps"], told["files"]) if same else None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None

    @classmethod
    def current(cls, folder: ModelFolder, *, progress: bool = False) -> Hashes:
        """Of all bytes as they are now, but for shards that nothing has touched since recorded."""
        stamps, known = _stamps(folder), cls.recorded(folder)
        if known is None:
            return cls.computed(folder, progress=progress)
        fresh = {shard for shard, stamp in stamps.items() if known.stamps.get(shard) == stamp}
        leaves = {
            name: known.leaves[name]
            for name, stored in folder.tensors.items()
            if stored.path.name in fresh and name in known.leaves
        }
        return _completed(cls(folder, leaves, {}, _files(folder.path)), stamps, progress)

    @property
    def weights(self) -> str:
        """One hash of all tensors: names, dtypes, shapes and bytes."""
        total = sha256(f"pieces of {PIECE} bytes\n".encode())
        for name, leaves in sorted(self.leaves.items()):
            stored = self.folder.tensors[name]
            total.update(json.dumps([name, str(stored.dtype), stored.shape, leaves]).encode())
        return total.hexdigest()

    @property
    def root(self) -> str:
        """One hash of the model: its weights and its other files."""
        return sha256(json.dumps([self.weights, sorted(self.files.items())]).encode()).hexdigest()

    def after(self, steps: dict[Piece, str]) -> Hashes:
        """The hashes when these pieces have these leaves; the stamps are those of before."""
        leaves = {name: list(held) for name, held in self.leaves.items()}
        for piece, leaf in steps.items():
            leaves[piece.tensor.name][piece.index] = leaf
        return replace(self, leaves=leaves)

    def stamped(self) -> Hashes:
        """With the stamps the shards have now: for who has just written to them."""
        return replace(self, stamps=_stamps(self.folder))

    def save(self) -> None:
        """Record them."""
        tensors = {name: _bytes(leaves) for name, leaves in self.leaves.items()}
        told = {"stamps": self.stamps, "files": self.files, "piece": PIECE}
        metadata = {name: json.dumps(value) for name, value in told.items()}
        path = _record(self.folder.path)
        temporary = path.with_suffix(
            f".{os.getpid()}{TEMPORARY}"
        )  # readers may verify side by side
        with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            write_at(descriptor, save(tensors, metadata), 0)
            os.fsync(descriptor)
        move(temporary, path)


def _completed(hashes: Hashes, stamps: dict[str, list], progress: bool) -> Hashes:
    """With the leaves that are lacking; `stamps` are from before, lest a change go unnoticed."""
    folder, leaves = hashes.folder, dict(hashes.leaves)
    pieces = [piece for piece in folder.pieces() if piece.tensor.name not in leaves]
    leaves |= {name: [] for name in folder.tensors if name not in leaves}

    def leaf_of(piece: Piece) -> str:
        return digest(folder.read(piece))

    for piece, leaf in each_piece(leaf_of, pieces, "hash", progress):
        leaves[piece.tensor.name].append(leaf)
    return replace(hashes, leaves=leaves, stamps=stamps)


def _stamps(folder: ModelFolder) -> dict[str, list]:
    stamps = {}
    for path in folder.shards:
        found = path.stat()
        header = folder.headers[path.name].digest
        stamps[path.name] = [found.st_size, found.st_mtime_ns, found.st_ino, header]
    return stamps


def _files(path: Path) -> dict[str, str]:
    return {
        file.name: sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.iterdir())
        if file.suffix in _MODEL_FILES and file.name != INDEX and file.is_file()
    }


def _record(path: Path) -> Path:
    return bookkeeping(path) / "hashes.safetensors"


def _bytes(leaves: list[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(leaves)), np.uint8).reshape(-1, 32)


def _hex(leaves: np.ndarray) -> list[str]:
    return [row.tobytes().hex() for row in leaves]
