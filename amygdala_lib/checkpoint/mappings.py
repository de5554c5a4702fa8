"""Mappings: who has a shard mapped into memory, and would see its weights change under it.

On the CPU, in the folder's own dtype, safetensors (and with it `from_pretrained`) gives out tensors
that are the file: what is written to the file appears in every model that was loaded from it, but
where that model has itself written to the page.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .shards import StoredTensor
from .state import Source, TensorSource


class Mapping(NamedTuple):
    """A file in a process's memory: its bytes from `offset` on are at `start`."""

    start: int
    offset: int
    inode: int
    name: str


def mapped_by(tensors: Iterable[StoredTensor], source: Source) -> dict[Path, list[int]]:
    """The processes that would see a change of these tensors, for each shard where there are any.

    Not if what is to be written is the mapping itself: a model loaded from the folder and trained
    in place has pages of its own wherever it differs from the file.

    Finds nothing where there is no /proc (macOS), and no processes of other users.
    """
    held = source.tensors if isinstance(source, TensorSource) else {}
    shards: dict[tuple[int, str], list[StoredTensor]] = {}
    for tensor in tensors:
        # Containers see other paths, and other disks have the same inodes: but not both the same.
        key = tensor.path.stat().st_ino, tensor.path.resolve().name
        shards.setdefault(key, []).append(tensor)

    def is_source(mapping: Mapping, tensor: StoredTensor) -> bool:
        address = mapping.start + tensor.offset - mapping.offset
        return tensor.name in held and held[tensor.name].data_ptr() == address

    found: dict[Path, set[int]] = {}
    names = [os.fsencode(name) for _, name in shards]
    for pid in _pids():
        for mapping in _mappings(pid, names):
            changed = shards.get((mapping.inode, mapping.name))
            own = pid == os.getpid() and changed and all(is_source(mapping, t) for t in changed)
            if changed and not own:
                found.setdefault(changed[0].path, set()).add(pid)
    return {shard: sorted(pids) for shard, pids in found.items()}


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []


def _mappings(pid: int, names: list[bytes]) -> Iterator[Mapping]:
    """A process's mappings of files whose path ends in one of the names."""
    try:
        content = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:  # it has ended, or is another user's
        return
    if not any(name in content for name in names):
        return
    for line in content.splitlines():
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if path and path[0].endswith(tuple(names)):
            start, name = addresses.partition(b"-")[0], os.fsdecode(os.path.basename(path[0]))
            yield Mapping(int(start, 16), int(offset, 16), int(inode), name)
