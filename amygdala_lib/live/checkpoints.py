"""Checkpoints: the folder a server was started from, brought to the weights it serves, and back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import diff, history, reading, rollback, sync
from ..checkpoint.hashes import Hashes
from ..checkpoint.history import entries, find
from ..checkpoint.shards import ModelFolder, Piece, StoredTensor
from ..checkpoint.state import named_tensors, source_of
from ..errors import CheckpointError
from .jobs import Refusal
from .record import Record

_WAIT = 10.0  # seconds for others who use the folder


class Checkpoints:
    """The model folder of one server, whose weights are those last read from it or written to it.

    The folder is compared with the server's memory once, before the first job: every byte has to be
    alike. From then on the record knows the hash of what the folder holds, and a folder that holds
    anything else is neither written to nor read back.

    folder: None where the model has none, which `problem` then says.
    """

    def __init__(self, folder: Path | None, model: PreTrainedModel, record: Record):
        self.folder, self.model, self.record = folder, model, record
        self.problem: str | None = None
        if folder is None:
            self.problem = (
                "the server was not started from a model folder, so there is none to write to: "
                "download the model, and serve its folder"
            )

    def begin(self) -> None:
        """Find out whether the folder holds the weights that are served; `problem` if not."""
        if self.record.parent is not None or self.problem is not None:
            return
        try:
            with reading(self.folder, wait=_WAIT):
                difference = diff(self.folder, self._state(), wait=_WAIT, progress=False)
                hashes = Hashes.current(ModelFolder.open(self.folder))
                with suppress(OSError):  # a folder that cannot be written to keeps no record
                    hashes.save()
        except CheckpointError as error:
            self.problem = str(error)
            return
        if difference:
            self.problem = (
                f"{self.folder} does not hold the weights that are served ({difference}): it was "
                "changed after the server read it, or the server changes what it reads"
            )
            return
        self.record.parent = hashes.weights
        self.record.save()

    def recover(self) -> dict[str, Any] | None:
        """After a kill: learn whether a checkpoint was written, and finish a rollback.

        Returns what was finished; None if nothing was under way.
        """
        doing = self.record.doing
        if doing is None:
            return None
        if doing["action"] == "rollback":
            return self._roll_back(doing["to"])
        found = entries(self.folder)
        written = found[-1] if found and found[-1].delta.record["facts"].get("job") else None
        if written and written.parent == self.record.parent and self._holds() == written.hash:
            self.record.parent = written.hash
            self.record.nothing_unsaved()
        self.record.doing = None
        self.record.save()
        return None

    def sync(self, why: str) -> dict[str, Any]:
        """Write what has changed into the folder; what was trained goes into its history.

        Raises Refusal (failed) if the folder is not as it was left, or cannot be written.
        """
        self._check()
        record = self.record
        last = record.unsaved[-1]["job"] if record.unsaved else None
        facts = {"job": last, "jobs": record.unsaved, "n_jobs": record.n_unsaved, "why": why}
        record.doing = {"action": "checkpoint"}
        record.save()
        try:
            change = sync(self.folder, self._state(), wait=_WAIT, progress=False, **facts)
        except CheckpointError as error:
            record.doing = None
            record.save()
            raise Refusal("failed", str(error)) from error
        if change.id is not None:
            record.parent = change.hash
        record.checkpoint = {
            "id": change.id,
            "folder": str(self.folder),
            "hash": record.parent,
            "jobs": record.n_unsaved,
            "shard_bytes": change.shard_bytes,
            "delta_bytes": change.delta_bytes,
            "seconds": round(sum(change.seconds.values()), 3),
            "why": why,
            "said": str(change),
        }
        record.nothing_unsaved()
        record.doing = None
        record.save()
        return record.checkpoint

    def rollback(self, to: int | str) -> dict[str, Any]:
        """Bring back a state of the history: the folder first, then the server's memory.

        What was trained since the last checkpoint is given up. A kill in between is made good by
        `recover`. Raises Refusal: invalid if there is no such state, failed as `sync` does.
        """
        self._check()
        self._find(to)
        self.record.doing = {"action": "rollback", "to": to}
        self.record.save()
        return self._roll_back(to)

    def history(self) -> list[dict[str, Any]]:
        """A row per state the folder has been in, oldest first, as JSON."""
        if self.folder is None:
            raise Refusal("failed", self.problem or "")
        try:
            frame = history(self.folder, wait=_WAIT, progress=False)
        except CheckpointError as error:
            raise Refusal("failed", str(error)) from error
        rows = frame.astype(object).where(frame.notna(), None).reset_index()
        return [
            {name: v.item() if isinstance(v, np.generic) else v for name, v in row.items()}
            for row in rows.to_dict("records")
        ]

    def _roll_back(self, to: int | str) -> dict[str, Any]:
        """Also the second time, if the first was cut short: the state `to` stays what it is."""
        record = self.record
        try:
            change = rollback(self.folder, to, wait=_WAIT, progress=False, by="live")
        except CheckpointError as error:
            record.doing = None
            record.save()
            raise Refusal("failed", str(error)) from error
        try:
            put_back(self.folder, self.model)
            record.parent = self._holds()
        except CheckpointError as error:
            said = f"the folder was rolled back, the server was not: {error}"
            raise Refusal("failed", said) from error
        given_up = record.n_unsaved
        record.nothing_unsaved()
        record.doing = None
        record.changed()
        return {
            "id": change.id,
            "folder": str(self.folder),
            "hash": record.parent,
            "jobs_given_up": given_up,
            "said": str(change),
        }

    def _find(self, to: int | str) -> None:
        try:
            with reading(self.folder, wait=_WAIT) as path:
                find(entries(path), to)
        except CheckpointError as error:
            raise Refusal("invalid", str(error)) from error

    def _check(self) -> None:
        """The folder holds the parent of the weights that are served."""
        self.begin()
        if self.problem:
            raise Refusal("failed", self.problem)
        try:
            held = self._holds()
        except CheckpointError as error:
            raise Refusal("failed", str(error)) from error
        if held != self.record.parent:
            raise Refusal(
                "failed",
                f"{self.folder} holds {held[:12]}, not {self.record.parent[:12]}, which the "
                "server's weights come from: another program has changed it since. Bring that "
                "state back (`amygdala history`, `amygdala rollback`) and ask again, or restart "
                "the server to serve what is there",
            )

    def _state(self) -> dict[str, Tensor]:
        with reading(self.folder, wait=_WAIT) as path:
            return as_stored(ModelFolder.open(path), self.model)

    def _holds(self) -> str:
        with reading(self.folder, wait=_WAIT) as path:
            return Hashes.current(ModelFolder.open(path)).weights


def as_stored(folder: ModelFolder, model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors by the folder's names, in the folder's dtypes.

    They are views of the model's memory but for the few that a server keeps wider, as vLLM does
    the decay rates of GatedDeltaNet (`A_log`, float32 of bfloat16): these are rounded copies. So
    what a server goes on with after a checkpoint is not rounded, and what it starts with from the
    folder is.
    """
    dtypes = {name: stored.dtype for name, stored in folder.tensors.items()}
    return {
        name: tensor.detach().to(dtypes.get(name, tensor.dtype))
        for name, tensor in named_tensors(model).items()
    }


@torch.no_grad()
def put_back(folder: Path, model: PreTrainedModel) -> None:
    """Write a folder's weights into a model's own memory, where they differ, and compare.

    Raises CheckpointError if they do not fit, or do not come out alike.
    """
    with reading(folder, wait=_WAIT) as path:
        opened = ModelFolder.open(path)
        _, tensors, problems = source_of(opened, as_stored(opened, model), None, False)
        if problems:
            raise CheckpointError("\n".join(problems))
        held, ends = named_tensors(model), _extents(model)
        if all(_lies_in(held[tensor.name], ends) for tensor in tensors):
            for tensor in tensors:
                _fill(held[tensor.name], opened, tensor)
        else:
            _load(path, model)
        if difference := diff(path, as_stored(opened, model), wait=_WAIT, progress=False):
            raise CheckpointError(f"{path} was read back into memory, and differs: {difference}")


def _fill(target: Tensor, folder: ModelFolder, stored: StoredTensor) -> None:
    """Piece by piece, whatever the strides and the dtype of the target."""
    if not target.is_contiguous() or target.dtype != stored.dtype:
        parts = [folder.read(piece) for piece in stored.pieces()]
        target.copy_(_tensor(np.concatenate(parts), stored).view(target.shape))
        return
    flat, itemsize = target.view(-1), stored.dtype.itemsize
    for piece in stored.pieces():
        start = piece.start // itemsize
        part = flat[start : start + piece.n_bytes // itemsize]
        found = _tensor(_read(folder, piece), stored).to(part.device)
        if not torch.equal(_bits(part), _bits(found)):
            part.copy_(found)


def _load(path: Path, model: PreTrainedModel) -> None:
    """For models whose weights are saved in other pieces: through a second one in main memory."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=next(iter(dtypes)) if len(dtypes) == 1 else "auto", device_map={"": "cpu"}
    )
    found = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(found[name])


def _read(folder: ModelFolder, piece: Piece) -> np.ndarray:
    return folder.read(piece).copy()  # torch takes no memory that cannot be written to


def _tensor(data: np.ndarray, stored: StoredTensor) -> Tensor:
    return torch.from_numpy(data).view(stored.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _extents(model: nn.Module) -> list[tuple[int, int]]:
    """Where the memory of a model's tensors begins and ends."""
    held: Mapping[str, Tensor] = model.state_dict()
    return [_extent(tensor) for tensor in held.values()]


def _extent(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _lies_in(tensor: Tensor, extents: list[tuple[int, int]]) -> bool:
    start, stop = _extent(tensor)
    return any(first <= start and stop <= last for first, last in extents)


def folder_of(model: str) -> Path | None:
    """The folder a server's model was loaded from; None for a Hugging Face id."""
    folder = Path(model).expanduser()
    return folder.resolve() if folder.is_dir() else None
