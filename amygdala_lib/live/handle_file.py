"""Handle file: where each weight of a running server lies, as JSON that is checked before use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LiveError
from .private import read_private_json, write_private_json

FORMAT = 1
TRANSPORTS = ("shared_memory", "cuda_ipc")
NAMINGS = ("transformers", "vllm")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

_LIMIT = 64 << 20  # bytes; a 27B model's is 0.3 MB
_MOST_DIMENSIONS = 8
_MOST_SAID = 20


@dataclass(frozen=True)
class SharedTensor:
    """One weight: all names it goes by, and its place.

    `memory` is the number of the memory it lies in, `offset` bytes from its start; `stride` counts
    elements.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: int
    offset: int

    @property
    def n_bytes(self) -> int:
        """From its first byte to its last, gaps between rows included."""
        return span(self.shape, self.stride) * self.dtype.itemsize

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor in its memory: no copy, and a version counter of its own."""
        start = self.offset // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, start, self.shape, self.stride)

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "shape": list(self.shape),
            "stride": list(self.stride),
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory": self.memory,
            "offset": self.offset,
        }


@dataclass(frozen=True)
class HandleFile:
    """What a server says of its weights.

    `pid` and `started` (see `start_time`) are of the process that holds them. `model` is the folder
    or id they were loaded from, `naming` whose names they go by, `memories` what the transport
    needs to open each of them, at least its size as `bytes`.
    """

    transport: str
    pid: int
    started: int
    model: str
    naming: str
    memories: tuple[dict[str, Any], ...]
    tensors: tuple[SharedTensor, ...]

    def write(self, path: Path) -> None:
        """Raises LiveError if the folder is not private, or writing fails."""
        write_private_json(
            path,
            {
                "format": FORMAT,
                "transport": self.transport,
                "pid": self.pid,
                "started": self.started,
                "model": self.model,
                "naming": self.naming,
                "memories": list(self.memories),
                "tensors": [tensor.to_json() for tensor in self.tensors],
            },
        )

    @classmethod
    def read(cls, path: Path) -> HandleFile:
        """Raises LiveError unless file and folder are this user's alone and every entry is sound.

        Sound: each tensor lies within its memory, no element shares its place with another, and
        all sizes are what a model's can be. Nothing is mapped before that is known.
        """
        found = read_private_json(path, _LIMIT)
        if found.get("format") != FORMAT:
            raise LiveError(
                f"{path} has format {found.get('format')!r}; this version reads {FORMAT}: run the "
                "same amygdala_lib in the server and here"
            )
        if problems := _misshapen(found):
            raise _unusable(path, problems)
        memories = tuple(found["memories"])
        tensors, problems = _tensors(found["tensors"], [memory["bytes"] for memory in memories])
        if problems := problems or _shared_places(tensors):
            raise _unusable(path, problems)
        return cls(
            **{name: found[name] for name in ("transport", "pid", "started", "model", "naming")},
            memories=memories,
            tensors=tuple(tensors),
        )


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def overlaps_itself(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two elements may share a place: some dimension steps into another's rows."""
    reach = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step < reach:
            return True
        if size > 1:
            reach = step * (size - 1) + reach
    return False


def _unusable(path: Path, problems: list[str]) -> LiveError:
    more = f"\n(and {len(problems) - _MOST_SAID:,} more)" if len(problems) > _MOST_SAID else ""
    return LiveError(
        f"{path} describes no weights that can be shared; nothing was opened. Stop the server, "
        "delete the file, start again:\n" + "\n".join(problems[:_MOST_SAID]) + more
    )


def _misshapen(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields around the tensors."""
    problems = []
    for name, allowed in (("transport", TRANSPORTS), ("naming", NAMINGS)):
        if found.get(name) not in allowed:
            problems.append(f"{name} is {found.get(name)!r}, none of {', '.join(allowed)}")
    for name in ("pid", "started"):
        if not _is_count(found.get(name)) or found[name] == 0:
            problems.append(f"{name} is {found.get(name)!r}, not a number of a process")
    if not isinstance(found.get("model"), str) or not found["model"]:
        problems.append(f"model is {found.get('model')!r}, not a folder or an id")
    for name in ("memories", "tensors"):
        if not isinstance(found.get(name), list) or not found[name]:
            problems.append(f"{name} is not a list with something in it")
    for number, memory in enumerate(found.get("memories") or [] if not problems else []):
        if not isinstance(memory, dict) or not _is_count(memory.get("bytes")):
            problems.append(f"memory {number} says no size")
    return problems


def _tensors(entries: list[Any], sizes: Sequence[int]) -> tuple[list[SharedTensor], list[str]]:
    """The tensors, and what is wrong with those that are left out."""
    found, problems, names = [], [], set()
    for number, entry in enumerate(entries):
        label = f"tensor {number}"
        if isinstance(entry, dict) and _is_list_of(entry.get("names"), str) and entry["names"]:
            label = f"tensor {number} ({entry['names'][0][:200]!r})"
            if twice := names.intersection(entry["names"]):
                problems.append(f"{label}: the name {min(twice)[:200]!r} is taken")
            names.update(entry["names"])
        if wrong := _wrong_in(entry, sizes):
            problems += [f"{label}: {what}" for what in wrong]
            continue
        found.append(
            SharedTensor(
                names=tuple(entry["names"]),
                shape=tuple(entry["shape"]),
                stride=tuple(entry["stride"]),
                dtype=DTYPES[entry["dtype"]],
                memory=entry["memory"],
                offset=entry["offset"],
            )
        )
    return found, problems


def _wrong_in(entry: Any, sizes: Sequence[int]) -> list[str]:
    if not isinstance(entry, dict):
        return ["not an object"]
    problems = []
    shape, stride, dtype = entry.get("shape"), entry.get("stride"), entry.get("dtype")
    if not _is_list_of(entry.get("names"), str) or not entry["names"]:
        problems.append("has no names")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problems.append(f"its dtype is {dtype!r}, none of {', '.join(DTYPES)}")
    for name, dimensions in (("shape", shape), ("stride", stride)):
        if not isinstance(dimensions, list) or not all(map(_is_count, dimensions)):
            problems.append(f"its {name} is not a list of whole numbers from 0")
        elif len(dimensions) > _MOST_DIMENSIONS:
            problems.append(f"its {name} has {len(dimensions)} dimensions")
    memory, offset = entry.get("memory"), entry.get("offset")
    if not _is_count(memory) or memory >= len(sizes):
        problems.append(f"it lies in memory {memory!r} of {len(sizes)}")
    if not _is_count(offset):
        problems.append(f"its offset is {offset!r}, not a whole number from 0")
    if problems:
        return problems
    if len(shape) != len(stride):
        return [f"{len(shape)} dimensions have {len(stride)} strides"]
    itemsize = DTYPES[dtype].itemsize
    if offset % itemsize:
        problems.append(f"offset {offset} is no multiple of {itemsize}, the size of a {dtype}")
    if overlaps_itself(shape, stride):
        problems.append(f"elements of shape {shape} overlap with strides {stride}")
    if (end := offset + span(shape, stride) * itemsize) > sizes[memory]:
        problems.append(f"it ends at byte {end:,} of a memory of {sizes[memory]:,}")
    return problems


def _shared_places(tensors: Sequence[SharedTensor]) -> list[str]:
    """Pairs of tensors that overlap, which names of one tensor never do."""
    problems = []
    placed = sorted(
        (tensor for tensor in tensors if tensor.n_bytes), key=lambda t: (t.memory, t.offset)
    )
    for first, second in zip(placed, placed[1:], strict=False):
        if first.memory == second.memory and first.offset + first.n_bytes > second.offset:
            problems.append(f"{first.names[0]!r} and {second.names[0]!r} overlap")
    return problems


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
