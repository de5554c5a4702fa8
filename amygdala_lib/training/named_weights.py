"""Weights by name: of a model, a state dict or a folder, read one tensor at a time."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checkpoint.shards import ModelFolder, shortened
from ..errors import TrainingError
from ..models import LanguageModel, weight_hash

Weights = LanguageModel | nn.Module | Mapping[str, Tensor] | Path | str
"""A model, a state dict, or a folder of safetensors."""


class NamedWeights(NamedTuple):
    """Weights to read one at a time; of the tensors in `layout`, only shape and dtype are used."""

    layout: dict[str, Tensor]
    read: Callable[[str], Tensor]
    name: str


def open_weights(weights: Weights) -> NamedWeights:
    """Weights to be read by name; tied ones once, under the name that comes first.

    Raises CheckpointError for a folder that is not whole, TrainingError for a model whose weights
    are partly offloaded.
    """
    if isinstance(weights, (str, Path)):
        return stored_weights(ModelFolder.open(weights))
    name = "a state dict"
    if isinstance(weights, LanguageModel):
        weights, name = weights.model, weights.name
    elif isinstance(weights, nn.Module):
        name = type(weights).__name__
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise TrainingError(
            f"{shortened(absent)} of {name} are not in memory: load it on one device"
        )
    held = distinct({name: tensor.detach() for name, tensor in tensors.items()})
    return NamedWeights(held, held.__getitem__, name)


def stored_weights(folder: ModelFolder) -> NamedWeights:
    """The weights in a folder or file, mapped into memory when they are read."""
    shards = {shard: safe_open(shard, framework="pt") for shard in folder.shards}
    layout = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in folder.tensors.items()
    }

    def read(name: str) -> Tensor:
        return shards[folder.tensors[name].path].get_tensor(name)

    return NamedWeights(layout, read, folder.path.name)


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without tensors that are another one under a second name, as tied embeddings are."""
    seen: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        seen.setdefault(place if tensor.numel() else (name,), name)
    return {name: tensors[name] for name in seen.values()}


def misfits(layouts: dict[str, Mapping[str, Tensor]], *, dtypes: bool) -> list[str]:
    """How two layouts, by what to call them, differ in names, shapes and, if asked, dtypes."""
    (first, here), (second, there) = layouts.items()
    problems = []
    for label, own, other in ((first, here, there), (second, there, here)):
        if lacking := [name for name in other if name not in own]:
            problems.append(f"the {label} lacks {shortened(lacking)}")
    both = [name for name in here if name in there]
    for kind in ("shape", "dtype") if dtypes else ("shape",):
        if unlike := [n for n in both if getattr(here[n], kind) != getattr(there[n], kind)]:
            shown = [
                f"{n} {_plain(getattr(here[n], kind))} and {_plain(getattr(there[n], kind))}"
                for n in unlike
            ]
            problems.append(
                f"another {kind} in the {first} than in the {second}: {shortened(shown)}"
            )
    return problems


def refuse_misfits(layouts: dict[str, Mapping[str, Tensor]], *, dtypes: bool) -> None:
    """Raises TrainingError with all `misfits`."""
    if problems := misfits(layouts, dtypes=dtypes):
        raise TrainingError("\n".join(problems))


def _plain(value: torch.Size | torch.dtype) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)


def state_hash(weights: Weights) -> str:
    """A hash (16 hex digits) of names and bits: that in the provenance of `TaskVector.between`.

    The same for a model, its state dict and the folder it was saved in with this dtype; not that of
    `weight_hash`, which depends on the order of a model's modules.
    """
    return hash_of(open_weights(weights), "hashing", progress=False)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: a bfloat16 holds too few digits to compute with."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def hash_of(weights: NamedWeights, doing: str, progress: bool) -> str:
    """`state_hash` of opened weights."""
    digest = hashlib.sha256()
    for name in progress_bar(sorted(weights.layout), doing, progress):
        digest.update(f"{name} {tensor_hash(weights.read(name))} ".encode())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A hash (16 hex digits) of one tensor's shape, dtype and bits, computed where it lies."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
    return weight_hash(module)


def progress_bar(names: Collection[str], doing: str, progress: bool) -> Iterable[str]:
    """The names, with a bar that counts them as tensors."""
    return tqdm(
        names,
        desc=doing,
        unit="tensor",
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not progress,
        leave=False,
    )
