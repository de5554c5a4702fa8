"""Sources: where the bytes come from that a folder is to be compared with, or is to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CheckpointError
from .delta import Delta, Step
from .encodings import Data
from .journal import digest
from .shards import ModelFolder, Piece, StoredTensor, resolved, shortened

State = Mapping[str, Tensor] | nn.Module | Path | str
Names = Callable[[str], str | None]


class Source(Protocol):
    def read(self, piece: Piece) -> Data:
        """What a piece is to be: as many bytes as it has."""


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Tensors on any device, views too, by their names in the folder."""

    tensors: dict[str, Tensor]

    def read(self, piece: Piece) -> Data:
        """A view of the tensor's memory if it lies in a row on the CPU; otherwise a copy."""
        tensor, itemsize = self.tensors[piece.tensor.name], piece.tensor.dtype.itemsize
        start, stop = piece.start // itemsize, (piece.start + piece.n_bytes) // itemsize
        return _span(tensor, start, stop).contiguous().cpu().view(torch.uint8).numpy()


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Tensors of another folder or file, by their names in this one."""

    folder: ModelFolder
    tensors: dict[str, StoredTensor]

    def read(self, piece: Piece) -> Data:
        return self.folder.read(Piece(self.tensors[piece.tensor.name], piece.index))


@dataclass(frozen=True, eq=False)
class DeltaSource:
    """The folder's own tensors after some deltas, the first of which applies to it as it is."""

    folder: ModelFolder
    steps: dict[Piece, list[tuple[Delta, Step]]]

    @classmethod
    def of(cls, folder: ModelFolder, deltas: Iterable[Delta]) -> DeltaSource:
        """Raises CheckpointError if a delta was made for another model."""
        steps: dict[Piece, list[tuple[Delta, Step]]] = {}
        for delta in deltas:
            for piece, step in delta.pieces(folder):
                steps.setdefault(piece, []).append((delta, step))
        return cls(folder, steps)

    def read(self, piece: Piece) -> Data:
        """Raises CheckpointError if a delta is damaged, or applies to other bytes than these."""
        content = self.folder.read(piece).copy()
        for delta, step in self.steps[piece]:
            if digest(content) != step.before:
                raise CheckpointError(
                    f"{delta.path} does not apply to {step.tensor} as {self.folder.path} has it: "
                    "`amygdala verify` says what has changed"
                )
            delta.encoded(step).apply(content)
        return content


def source_of(
    folder: ModelFolder, state: State, names: Names | None, partial: bool
) -> tuple[Source, list[StoredTensor], list[str]]:
    """A source of `state`, the tensors of `folder` it has, and all that keeps it from fitting.

    A name that the folder lacks is passed over if it is tied: if it shares the memory of a tensor
    the folder has.
    """
    other, held = None, {}
    if isinstance(state, Path | str):
        path = resolved(state)
        other = ModelFolder.of_file(path) if path.is_file() else ModelFolder.open(path)
        held = other.tensors
    else:
        named = named_tensors(state) if isinstance(state, nn.Module) else state
        if strange := [str(name) for name, tensor in named.items() if not _is_dense(tensor)]:
            raise CheckpointError(f"not dense tensors, in the state: {shortened(strange)}")
        held = {name: tensor.detach() for name, tensor in named.items()}
    found, problems = _renamed(held, names)
    extra = found.keys() - folder.tensors.keys()
    problems += _misfits(folder, {n: t for n, t in found.items() if n not in extra}, partial)
    if other is None:
        kept = {_memory(tensor) for name, tensor in found.items() if name not in extra}
        extra = {name for name in extra if _memory(found[name]) not in kept}
    if extra:
        problems.append(
            f"not in {folder.path}: {shortened(sorted(extra))}. Map names with `names` (a function "
            "from the state's to the folder's; None leaves one out)"
        )
    fitting = [tensor for name, tensor in folder.tensors.items() if name in found]
    return FolderSource(other, found) if other else TensorSource(found), fitting, problems


def named_tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's tensors by the names, and in the pieces, that it would be saved with."""
    state = model.state_dict()
    return revert_weight_conversion(model, state) if isinstance(model, PreTrainedModel) else state


def _renamed(held: Mapping[str, Tensor], names: Names | None) -> tuple[dict, list[str]]:
    found: dict[str, Tensor] = {}
    twice = set()
    for name, tensor in held.items():
        renamed = names(name) if names else name
        if renamed is None:
            continue
        if renamed in found and _memory(found[renamed]) != _memory(tensor):
            twice.add(renamed)
        found[renamed] = tensor
    problem = f"several tensors of the state go by the name {shortened(sorted(twice))}"
    return found, [problem] if twice else []


def _misfits(folder: ModelFolder, found: Mapping[str, Tensor], partial: bool) -> list[str]:
    missing, shapes, dtypes, without = [], [], [], []
    for name, stored in folder.tensors.items():
        if name not in found:
            missing.append(name)
            continue
        tensor = found[name]
        if tuple(tensor.shape) != stored.shape:
            shapes.append(f"{name} is {list(tensor.shape)}, not {list(stored.shape)}")
        if tensor.dtype != stored.dtype:
            dtypes.append(f"{name} is {_short(tensor.dtype)}, not {_short(stored.dtype)}")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            without.append(name)
    problems = []
    if missing and not partial:
        problems.append(
            f"missing from the state: {shortened(missing)}. partial=True leaves them as they are"
        )
    if shapes:
        problems.append(f"other shapes than in the folder: {shortened(shapes)}")
    if dtypes:
        problems.append(
            f"other dtypes than in the folder: {shortened(dtypes)}. Nothing is cast silently: load "
            "the model in the folder's dtype, or convert the state yourself"
        )
    if without:
        problems.append(f"on the meta device, without values: {shortened(without)}")
    return problems


def _is_dense(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided


def _memory(tensor: Tensor | StoredTensor) -> object:
    """Equal for two tensors if they are the same values in the same place."""
    if isinstance(tensor, StoredTensor):
        return tensor.path, tensor.offset, tensor.shape
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _span(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` in row order; copies no more than the rows that hold them."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    while len(tensor) == 1:
        tensor = tensor[0]
    row = tensor[0].numel()
    first, last = start // row, -(-stop // row)
    return tensor[first:last].reshape(-1)[start - first * row : stop - first * row]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
