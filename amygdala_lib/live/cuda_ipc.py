"""CUDA IPC: weights on a GPU, opened by other processes on the same machine where they lie."""

from __future__ import annotations

import base64
import binascii
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import LiveError
from .handle_file import HandleFile, SharedTensor
from .weights import Weight

_EXPANDABLE = b"e"
"""The second byte of torch's handles (version 2) says which kind of allocation they are of."""

_LONGEST = 1 << 12
"""Bytes of a handle; CUDA's have 64, torch puts two before them."""

_COUNTERS = 10_000
"""Counts in one of torch's files; it writes to the place a handle names without looking."""

_KEPT: list[torch.UntypedStorage] = []
"""Memory that clients had open when it was withdrawn: given back when this process ends."""


class CudaMemory:
    """The CUDA allocations that a model's weights lie in, open to this user's processes.

    Nothing is moved. torch counts one reader per export: it sets a count to one, each reader takes
    one away when it lets go, and looks at the count when the memory is freed. With many readers, or
    one that was killed, that count says nothing, so the storages are held here until `close`, which
    is told whether anyone has them open.
    """

    transport = "cuda_ipc"

    def __init__(self, weights: Sequence[Weight]):
        """Raises LiveError, naming the weights, if their memory is of a kind that cannot be shared.

        Kinds that cannot: expandable segments, whose handles torch writes and reads in ways that
        differ by version; pools of other allocators (vLLM's sleep mode, which moves the weights);
        and any memory on WSL2.
        """
        if problems := [*_wrong_platform(), *unshareable(weights, torch.cuda.memory_snapshot())]:
            raise LiveError("CUDA memory cannot be shared:\n" + "\n".join(problems))
        storages = {
            weight.tensor.untyped_storage().data_ptr(): weight.tensor.untyped_storage()
            for weight in weights
        }
        numbers = {pointer: number for number, pointer in enumerate(storages)}
        self.tensors = tuple(
            SharedTensor(
                weight.names,
                tuple(weight.tensor.shape),
                weight.tensor.stride(),
                weight.tensor.dtype,
                numbers[weight.tensor.untyped_storage().data_ptr()],
                weight.tensor.storage_offset() * weight.tensor.element_size(),
            )
            for weight in weights
        )
        self._storages = list(storages.values())
        exported: list[dict[str, Any]] = []
        try:
            for storage in self._storages:
                exported.append(_exported(storage))
        except BaseException:
            _release(exported)
            raise
        self.memories = tuple(exported)

    def close(self, *, in_use: bool) -> None:
        """Let go of the memory; if anyone has it open (`in_use`), only when this process ends."""
        if in_use:
            _KEPT.extend(self._storages)
        else:
            _release(self.memories)
        self._storages = []


def unshareable(weights: Sequence[Weight], segments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which weights lie in memory that CUDA IPC cannot hand on, and why.

    `segments` is `torch.cuda.memory_snapshot()`.
    """
    problems = []
    for weight in weights:
        tensor = weight.tensor
        if not tensor.numel():
            problems.append(f"{weight.names[0]} has no elements")
            continue
        around = [
            segment
            for segment in segments
            if segment["device"] == (tensor.device.index or 0)
            and segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
        ]
        if not around:
            problems.append(
                f"{weight.names[0]} was not allocated by torch's own allocator: leave "
                "PYTORCH_ALLOC_CONF=backend:... and other allocators out"
            )
        elif around[0].get("is_expandable"):
            problems.append(
                f"{weight.names[0]} lies in an expandable segment: start the server without "
                "expandable_segments in PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF"
            )
        elif tuple(around[0].get("segment_pool_id", (0, 0))) != (0, 0):
            problems.append(
                f"{weight.names[0]} lies in a memory pool of its own: start the server without "
                "--enable-sleep-mode, which moves the weights"
            )
    return problems


def check_memory(memory: Mapping[str, Any]) -> list[str]:
    """What is wrong with an entry of a handle file's `memories`."""
    problems = []
    for name in ("handle", "counter", "event"):
        try:
            content = base64.b64decode(memory.get(name), validate=True)
        except (TypeError, ValueError, binascii.Error):
            problems.append(f"its {name} is not base64")
            continue
        if not 0 < len(content) <= _LONGEST:
            problems.append(f"its {name} has {len(content):,} bytes")
        elif name == "handle" and _is_expandable(content):
            problems.append("it is an expandable segment")
    for name, most in (("offset", 1 << 62), ("counter_offset", _COUNTERS - 1)):
        value = memory.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            problems.append(f"its {name} is {value!r}, not a whole number from 0 to {most:,}")
    if not isinstance(memory.get("device"), str):
        problems.append(f"its device is {memory.get('device')!r}, not a UUID")
    if not isinstance(memory.get("event_required"), bool):
        problems.append(f"its event_required is {memory.get('event_required')!r}")
    return problems


def open_memories(handle: HandleFile) -> list[torch.UntypedStorage]:
    """Open the CUDA memory of a running server; its devices are found by UUID, not by number.

    Raises LiveError if this process cannot see the device, or CUDA refuses.
    """
    if handle.pid == os.getpid():
        raise LiveError(
            "CUDA does not open memory in the process that holds it: attach in another one"
        )
    if not torch.cuda.is_available():
        raise LiveError(
            "the weights are on a GPU, and this process has none: install torch with CUDA, and set "
            "CUDA_VISIBLE_DEVICES as for the server"
        )
    torch.cuda.init()
    devices = {
        str(torch.cuda.get_device_properties(number).uuid): number
        for number in range(torch.cuda.device_count())
    }
    problems = []
    for memory in handle.memories:
        if memory["device"] not in devices:
            problems.append(f"the server's device {memory['device']} is not visible here")
        elif (
            memory["offset"] + memory["bytes"]
            > torch.cuda.get_device_properties(devices[memory["device"]]).total_memory
        ):
            problems.append(f"{memory['bytes']:,} bytes at {memory['offset']:,} are on no device")
    if problems:
        seen = ", ".join(devices)
        raise LiveError("\n".join([*dict.fromkeys(problems), f"visible devices: {seen}"]))
    return [_opened(memory, devices[memory["device"]]) for memory in handle.memories]


def to_memory(exported: tuple, device: str) -> dict[str, Any]:
    """What `UntypedStorage._share_cuda_` returns, as an entry of a handle file."""
    _, handle, n_bytes, offset, counter, counter_offset, event, event_required = exported
    return {
        "device": device,
        "bytes": n_bytes,
        "offset": offset,
        "handle": base64.b64encode(handle).decode(),
        "counter": base64.b64encode(counter).decode(),
        "counter_offset": counter_offset,
        "event": base64.b64encode(event).decode(),
        "event_required": event_required,
    }


def from_memory(memory: Mapping[str, Any], device: int) -> tuple:
    """What `UntypedStorage._new_shared_cuda` takes, of an entry of a handle file."""
    return (
        device,
        base64.b64decode(memory["handle"]),
        memory["bytes"],
        memory["offset"],
        base64.b64decode(memory["counter"]),
        memory["counter_offset"],
        base64.b64decode(memory["event"]),
        memory["event_required"],
    )


def _exported(storage: torch.UntypedStorage) -> dict[str, Any]:
    uuid = str(torch.cuda.get_device_properties(storage.device).uuid)
    try:
        memory = to_memory(storage._share_cuda_(), uuid)
    except RuntimeError as error:
        raise LiveError(
            f"CUDA does not share {storage.nbytes():,} bytes on {storage.device} ({error}): start "
            "the server without expandable_segments and --enable-sleep-mode, and not on WSL2"
        ) from error
    if problems := check_memory(memory):
        _release([memory])
        raise LiveError(
            f"torch {torch.__version__} shares memory on {storage.device} in a way that is not "
            f"known here: {'; '.join(problems)}"
        )
    return memory


def _opened(memory: Mapping[str, Any], device: int) -> torch.UntypedStorage:
    try:
        return torch.UntypedStorage._new_shared_cuda(*from_memory(memory, device))
    except RuntimeError as error:
        raise LiveError(
            f"CUDA does not open the server's memory on cuda:{device} ({error}): attach as the "
            "same user and in the same container; if the server has restarted, use its new file"
        ) from error


def _is_expandable(handle: bytes) -> bool:
    """A bare CUDA handle, of an older torch, has 64 bytes and says nothing."""
    return len(handle) != 64 and handle[1:2] == _EXPANDABLE


def _release(memories: Sequence[Mapping[str, Any]]) -> None:
    """Count the exports as read, so that torch gives the memory back when it is freed."""
    for memory in memories:
        counter = base64.b64decode(memory["counter"])
        torch.UntypedStorage._release_ipc_counter_cuda(counter, memory["counter_offset"])


def _wrong_platform() -> list[str]:
    if "microsoft" in platform.release().lower():
        return ["WSL2 has no CUDA IPC: run the server on Linux itself"]
    return []
