"""Undo: the weights before a job, kept beside the server's until the job is over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from .private import check_private, read_private_json, write_private_json

_ALIGNED = 64  # bytes
_SPARE = 256 << 20  # bytes of memory and disk to be left
_INDEX_LIMIT = 64 << 20


class Undo:
    """Copies of weights in a file that outlives its writer, so that a killed job can be undone.

    The file is mapped, not written: what a killed process had put into it is there. `undo.json`
    names the job, and the copies once they are whole. As long as it is there, the job has not
    ended, and what it names can be put back.
    """

    def __init__(self, folder: Path):
        self._data, self._index = folder / "undo.bin", folder / "undo.json"

    def lacking_room(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why these cannot be kept; None if they can."""
        needed = _size(tensors) + _SPARE
        rest = os.statvfs(self._data.parent)
        free = min(rest.f_bavail * rest.f_frsize, psutil.virtual_memory().available)
        if free >= needed:
            return None
        return (
            f"a copy of the weights takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory and "
            f"disk are free in {self._data.parent}"
        )

    def keep(self, tensors: Mapping[str, Tensor], **facts: Any) -> dict[str, Tensor]:
        """Copy the tensors; returns the copies, on the CPU, which are gone with `discard`.

        Raises OSError if there is no room.
        """
        self.discard()
        self._write(facts, 0, {})
        size = _size(tensors)
        descriptor = os.open(self._data, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # or a full disk would kill with SIGBUS
        except OSError:
            self._data.unlink()
            raise
        finally:
            os.close(descriptor)
        entries, offset = {}, 0
        for name, tensor in tensors.items():
            entries[name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "offset": offset,
            }
            offset += _padded(tensor)
        kept = self._mapped(entries, size)
        for name, tensor in tensors.items():
            kept[name].copy_(tensor.detach())
        self._write(facts, size, entries)
        return kept

    def pending(self) -> dict[str, Any] | None:
        """The facts of a job that has not ended; None if there is none.

        Raises LiveError if the record is damaged or not this user's alone.
        """
        if not self._index.exists():
            return None
        return read_private_json(self._index, _INDEX_LIMIT)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what was kept, to the bit."""
        record = read_private_json(self._index, _INDEX_LIMIT)
        if not record["tensors"]:
            return
        check_private(self._data)
        for name, kept in self._mapped(record["tensors"], record["size"]).items():
            tensors[name].copy_(kept)

    def discard(self) -> None:
        """Forget what was kept; does nothing if nothing was."""
        self._index.unlink(missing_ok=True)
        self._data.unlink(missing_ok=True)

    def _write(self, facts: Mapping[str, Any], size: int, entries: Mapping[str, Any]) -> None:
        write_private_json(self._index, {**facts, "size": size, "tensors": entries})

    def _mapped(self, entries: Mapping[str, Any], size: int) -> dict[str, Tensor]:
        storage = torch.UntypedStorage.from_file(str(self._data), True, size)
        found = {}
        for name, entry in entries.items():
            dtype = getattr(torch, entry["dtype"])
            shape = torch.Size(entry["shape"])
            whole = torch.empty(0, dtype=dtype)
            strides = torch.empty(shape, device="meta").stride()
            found[name] = whole.set_(storage, entry["offset"] // dtype.itemsize, shape, strides)
        return found


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _size(tensors: Mapping[str, Tensor]) -> int:
    return max(_ALIGNED, sum(map(_padded, tensors.values())))
