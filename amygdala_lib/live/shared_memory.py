"""Shared memory: weights on the CPU, moved once to where other processes can map them (Linux)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from ..errors import LiveError
from .handle_file import HandleFile, SharedTensor, overlaps_itself, span
from .weights import Weight

ALIGNMENT = 64
"""Bytes; a cache line, and more than any CPU kernel asks for."""

_SEALS = 0x1 | 0x2 | 0x4
"""Of memory: it can neither shrink nor grow, and this cannot be undone (Linux's numbers)."""


class SharedMemory:
    """The memory that a model's weights now lie in; open to this user as long as it is not closed.

    The weights stay where they are when it is closed: nobody else can map them any more.
    """

    transport = "shared_memory"

    def __init__(self, weights: Sequence[Weight]):
        """Moves every weight. Raises LiveError if memory does not suffice, before moving any."""
        places, size = _planned(weights)
        _check_room(weights, size)
        self.descriptor = _new_memory(size)
        try:
            storage = _mapped(self.descriptor, size)
            self.tensors = tuple(places)
            self._move(weights, storage)
        except BaseException:
            self.close(in_use=False)
            raise
        inode = os.fstat(self.descriptor).st_ino
        self.memories = ({"descriptor": self.descriptor, "inode": inode, "bytes": size},)

    def _move(self, weights: Sequence[Weight], storage: torch.UntypedStorage) -> None:
        total = sum(tensor.n_bytes for tensor in self.tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc="share weights", delay=2) as bar:
            for weight, tensor in zip(weights, self.tensors, strict=True):
                shared = tensor.view(storage)
                shared.copy_(weight.tensor)
                weight.move_to(shared)
                bar.update(tensor.n_bytes)

    def close(self, *, in_use: bool) -> None:
        """Nobody can map the memory from now on; who has mapped it (`in_use`) keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def check_memory(memory: dict[str, Any]) -> list[str]:
    """What is wrong with an entry of a handle file's `memories`."""
    wrong = [
        name
        for name in ("descriptor", "inode")
        if not isinstance(memory.get(name), int) or isinstance(memory[name], bool)
    ]
    return [f"its {name} is {memory.get(name)!r}, not a whole number" for name in wrong]


def open_memories(handle: HandleFile) -> list[torch.UntypedStorage]:
    """Map the memory of a running server: no copy is made, and what is written there is seen here.

    Raises LiveError if it is not the memory that the handle file was written of.
    """
    return [_opened(handle.pid, memory) for memory in handle.memories]


def _opened(pid: int, memory: dict[str, Any]) -> torch.UntypedStorage:
    path = f"/proc/{pid}/fd/{memory['descriptor']}"
    try:
        # O_NONBLOCK: should another kind of file have come to have this number, nothing waits.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LiveError(
            f"the memory of process {pid} cannot be opened ({path}: {error.strerror}): attach as "
            "the user who runs the server, in the same container. If it has stopped sharing its "
            "weights, start it again"
        ) from error
    try:
        found = os.fstat(descriptor)
        seals = _seals(descriptor)
        if (found.st_ino, found.st_size) != (memory["inode"], memory["bytes"]) or seals != _SEALS:
            raise LiveError(
                f"{path} is not the memory that the handle file was written of ({found.st_size:,} "
                f"bytes, not {memory['bytes']:,}): start the server again"
            )
        return _mapped(descriptor, memory["bytes"])
    finally:
        os.close(descriptor)


def _seals(descriptor: int) -> int | None:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return None  # another kind of file


def _planned(weights: Sequence[Weight]) -> tuple[list[SharedTensor], int]:
    """Where each weight is to lie, and the size of it all."""
    places, end = [], 0
    for weight in weights:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        tensor = weight.tensor
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        if span(shape, stride) != tensor.numel() or overlaps_itself(shape, stride):
            # Gaps between rows are left out, and what is one element for many becomes many.
            stride = tuple(torch.empty_like(tensor, device="meta").stride())
        places.append(SharedTensor(weight.names, shape, stride, tensor.dtype, 0, start))
        end = start + places[-1].n_bytes
    return places, end


def _check_room(weights: Sequence[Weight], size: int) -> None:
    """Weights are moved one by one: what this process holds of them is given back on the way."""
    largest = max(weight.tensor.nbytes for weight in weights)
    needed = max(largest, size - _private_bytes())
    available = psutil.virtual_memory().available
    if needed > available:
        raise LiveError(
            f"sharing {size / 1e9:.2f} GB of weights takes {needed / 1e9:.2f} GB more than this "
            f"process has, and {available / 1e9:.2f} GB are free: stop other programs, or serve a "
            "smaller model"
        )


def _private_bytes() -> int:
    """Memory of this process that no file and no other process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _new_memory(size: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise LiveError("weights on the CPU can be shared on Linux only: serve on a GPU, or there")
    descriptor = os.memfd_create("amygdala-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        # Of a fixed size, or one process could cut off what another is reading (SIGBUS).
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(descriptor: int, size: int) -> torch.UntypedStorage:
    """Readable and writable; stays mapped for as long as a tensor lies in it."""
    return torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
