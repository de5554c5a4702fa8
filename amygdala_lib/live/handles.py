"""Handles: the weights of a running server, shared with this user's other processes."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import LiveError
from . import cuda_ipc, shared_memory
from .handle_file import HandleFile
from .owner import start_time
from .private import open_private
from .weights import weights_of_module

_TRANSPORTS: dict[str, ModuleType] = {"shared_memory": shared_memory, "cuda_ipc": cuda_ipc}
_EXPORTS: weakref.WeakKeyDictionary[nn.Module, Export] = weakref.WeakKeyDictionary()


class Export:
    """The weights of a model, open to this user's processes until `close` or the model's end.

    It lives as long as the model, whether or not it is kept. At a normal end of the process the
    handle file is removed; after a kill it stays, and whoever opens it is told that its owner has
    gone.
    """

    def __init__(self, path: Path, memory: shared_memory.SharedMemory | cuda_ipc.CudaMemory):
        self.path = path
        self._inode = os.stat(path).st_ino
        self._memory = memory
        self._finalizer = weakref.finalize(self, _withdraw, path, self._inode, memory, os.getpid())

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the weights lie in."""
        return sum(memory["bytes"] for memory in self._memory.memories)

    def close(self) -> None:
        """Remove the handle file; who has attached is refused further writes by `check`.

        The model goes on as it is. May be called twice.
        """
        self._finalizer()

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SharedWeights:
    """The weights of a server, mapped into this process: a write is seen by both at once.

    `tensors` has each of them by every name the server has for it, tied ones several times; all
    lie in the server's memory. `model` is the folder or id it was loaded from, `naming` says whose
    names these are: "transformers" or "vllm".
    """

    def __init__(self, path: Path, handle: HandleFile, descriptor: int):
        self.path = path
        self.pid = handle.pid
        self.model = handle.model
        self.naming = handle.naming
        self.tensors: dict[str, Tensor] = {}
        self._started = handle.started
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def __repr__(self) -> str:
        n_bytes = sum(tensor.nbytes for tensor in self._once())
        state = "alive" if self.alive() else "gone"
        return (
            f"<SharedWeights of {self.model} in process {self.pid} ({state}): "
            f"{len(self.tensors)} names, {n_bytes / 1e9:.3f} GB>"
        )

    def alive(self) -> bool:
        """Whether the server that holds the weights still runs, and shares them."""
        return self._lost() is None

    def check(self) -> None:
        """Raises LiveError if nobody serves from these weights any more: call it before a write."""
        if lost := self._lost():
            raise LiveError(f"the weights of {self.model} are lost: {lost}. Attach again")

    def close(self) -> None:
        """Let go of the weights. Their memory is unmapped when no tensor in it is left."""
        self.tensors = {}
        self._finalizer()

    def __enter__(self) -> SharedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lost(self) -> str | None:
        if not self._finalizer.alive:
            return "they were closed here"
        if (started := start_time(self.pid)) is None:
            return f"process {self.pid}, which served from them, has ended"
        if started != self._started:
            return f"process {self.pid}, which served from them, has ended, and another has its id"
        if os.fstat(self._descriptor).st_nlink == 0:
            return f"the server has withdrawn or replaced {self.path}"
        return None

    def _once(self) -> Iterator[Tensor]:
        return iter({id(tensor): tensor for tensor in self.tensors.values()}.values())


def export_weights(model: nn.Module, path: Path | str, *, model_name: str) -> Export:
    """Share the parameters of a model with this user's processes, where the model serves from them.

    On the CPU they are moved, one by one, into memory that can be shared, each 64-byte aligned; on
    CUDA they stay where they are. `path` is the handle file to be written, in a private folder (see
    `private_folder`); `model_name` the folder or id the model was loaded from. Parameters keep
    their identity, so whatever holds the model's `nn.Parameter`s sees no change; views of their
    memory taken before, on the CPU, keep the old values.

    Raises LiveError, before anything is moved, if a parameter is quantised, or shares a part of its
    memory with another tensor; if memory does not suffice; or if `path` is another server's.
    """
    path = Path(path).absolute()
    if (earlier := _EXPORTS.get(model)) and earlier._finalizer.alive:
        raise LiveError(f"this model is shared already, as {earlier.path}: close that first")
    _refuse_another_server(path)
    if (started := start_time(os.getpid())) is None:
        raise LiveError("weights are shared on Linux only, which has /proc: serve there")
    weights = weights_of_module(model)
    on_cpu = weights[0].tensor.device.type == "cpu"
    with torch.no_grad():
        memory = (shared_memory.SharedMemory if on_cpu else cuda_ipc.CudaMemory)(weights)
    try:
        HandleFile(
            transport=memory.transport,
            pid=os.getpid(),
            started=started,
            model=model_name,
            naming="vllm" if _is_vllm(model) else "transformers",
            memories=memory.memories,
            tensors=memory.tensors,
        ).write(path)
        export = Export(path, memory)
    except BaseException:
        memory.close(in_use=False)
        raise
    _EXPORTS[model] = export
    return export


def open_handles(path: Path | str) -> SharedWeights:
    """Map the weights of a running server, which `export_weights` has written to `path`.

    Raises LiveError, before anything is mapped, if the file or its folder is not this user's alone,
    its server has gone, or an entry does not fit the memory it says it lies in.
    """
    path = Path(path).absolute()
    # Kept open while attached: its lock, which ends with this process however that ends, says so.
    descriptor = open_private(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        handle = HandleFile.read(path)
        transport = _TRANSPORTS[handle.transport]
        problems = [
            f"memory {number}: {what}"
            for number, memory in enumerate(handle.memories)
            for what in transport.check_memory(memory)
        ]
        if problems:
            raise LiveError(
                f"{path} describes no memory that can be opened:\n" + "\n".join(problems)
            )
        shared = SharedWeights(path, handle, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        shared.check()
        storages = transport.open_memories(handle)
        shared.check()  # the process may have ended, and another got its number, in between
        for tensor in handle.tensors:
            view = tensor.view(storages[tensor.memory])
            shared.tensors |= dict.fromkeys(tensor.names, view)
    except BaseException:
        shared.close()
        raise
    return shared


def _refuse_another_server(path: Path) -> None:
    """Raises LiveError if the file at `path` is of a process that still runs, this one too."""
    if not path.exists():
        return
    try:
        found = HandleFile.read(path)
    except LiveError:
        return  # nobody can open it: it is written anew
    if start_time(found.pid) == found.started:
        raise LiveError(
            f"{path} is in use by process {found.pid}, which serves {found.model}: stop it, or "
            "give another path"
        )


def _withdraw(
    path: Path, inode: int, memory: shared_memory.SharedMemory | cuda_ipc.CudaMemory, pid: int
) -> None:
    """Remove the handle file, then let go of the memory unless a process has it open."""
    if os.getpid() != pid:
        return  # a fork of the server ends; the server goes on
    in_use = True  # if it cannot be told
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_ino == inode:
                path.unlink()  # first: who locks it from now on sees that it is gone
                in_use = not _locked_alone(descriptor)
        finally:
            os.close(descriptor)
    memory.close(in_use=in_use)


def _locked_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_vllm(model: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "vllm" for kind in type(model).__mro__)
