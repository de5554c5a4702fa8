"""Task vectors: what training changed, as tensors to add, negate, scale and merge."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..artefacts import as_json, provenance, replacing
from ..checkpoint.shards import ModelFolder, shortened
from ..errors import ArtefactError, TrainingError
from ..models import LanguageModel
from .applied import Applied
from .named_weights import (
    Weights,
    distinct,
    hash_of,
    open_weights,
    progress_bar,
    refuse_misfits,
    stored_weights,
    wide,
)

_STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_KEY = "task_vector"  # of the provenance in the file's metadata


class TaskVector:
    """A difference of weights, tensor by tensor (Ilharco et al. 2023, arXiv 2212.04089).

    `+`, `-`, `*` and negation give new vectors. Nothing is computed until a tensor is asked for
    (`vector[name]`, `save`, `apply`), and then one at a time, so that vectors on disk are combined
    in the memory of a few tensors. `layout` holds names with shapes and dtypes (tensors without
    data), `provenance` where the vector comes from.
    """

    def __init__(
        self,
        layout: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        origin: Mapping[str, Any] | None = None,
    ):
        self.layout = {name: tensor.to("meta") for name, tensor in layout.items()}
        self.provenance = dict(origin or {})
        self._read = read

    @classmethod
    def between(
        cls,
        base: Weights,
        tuned: Weights,
        *,
        dtype: torch.dtype | None = None,
        to: Path | str | None = None,
        progress: bool = True,
    ) -> TaskVector:
        """tuned - base, for every weight: tied ones once, under the name that comes first.

        Kept in float32 (float64 for such weights), so that base + vector is tuned again: to the
        bit for bfloat16 weights that keep their sign, to rounding for float32. `dtype` can be
        torch.bfloat16, half the size and rounded. In memory, on the CPU, or with `to` in a file,
        with one tensor in memory at a time. The provenance has the `state_hash` of both.

        Raises TrainingError, naming everything that differs, unless both have the same names,
        shapes and dtypes and equal integers; CheckpointError for a folder that is not whole.
        """
        before, after = open_weights(base), open_weights(tuned)
        refuse_misfits({"base": before.layout, "tuned": after.layout}, dtypes=True)
        if dtype is not None and dtype not in _STORED:
            raise TrainingError(f"{dtype} cannot hold a difference: choose of {list(_STORED)}")
        floats = {n: t for n, t in after.layout.items() if t.is_floating_point()}
        if changed := [
            name
            for name in after.layout.keys() - floats.keys()
            if not torch.equal(before.read(name).cpu(), after.read(name).cpu())
        ]:
            raise TrainingError(f"{shortened(sorted(changed))} hold other integers: not one model")

        def difference(name: str) -> Tensor:
            delta = wide(after.read(name).cpu()) - wide(before.read(name).cpu())
            return delta.to(layout[name].dtype)

        layout = {n: t.to(dtype or wide(t).dtype) for n, t in floats.items()}
        origin = {"operation": "difference"} | {
            key: {"name": weights.name, "hash": hash_of(weights, f"hashing {key}", progress)}
            for key, weights in {"base": before, "tuned": after}.items()
        }
        vector = cls(layout, difference, origin)
        if to is None:
            return vector.in_memory(progress=progress)
        vector.save(to, progress=progress)
        return cls.load(to)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Float[Tensor, "*shape"]], origin: Mapping[str, Any] | None = None
    ) -> TaskVector:
        """A vector of these tensors, which are not to be changed afterwards."""
        if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in _STORED]:
            raise TrainingError(f"{shortened(wrong)} hold no differences: give {list(_STORED)}")
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return cls(held, held.__getitem__, origin)

    @classmethod
    def load(cls, path: Path | str) -> TaskVector:
        """Open what `save` wrote; tensors are read from the file when they are asked for.

        The file stays open: one that later takes its name is another file.

        Raises CheckpointError if the file is missing or damaged, ArtefactError if it is no task
        vector.
        """
        file = ModelFolder.of_file(path)
        [header] = file.headers.values()
        if _KEY not in header.metadata:
            raise ArtefactError(f"{path} is no task vector: give what `TaskVector.save` wrote")
        stored = stored_weights(file)
        return cls(stored.layout, stored.read, json.loads(header.metadata[_KEY]))

    @property
    def names(self) -> list[str]:
        return list(self.layout)

    def __getitem__(self, name: str) -> Float[Tensor, "*shape"]:
        """The difference of one weight, on the CPU. Raises TrainingError if there is no such."""
        if name not in self.layout:
            raise TrainingError(f"no {name!r} in this vector: it has {shortened(self.names)}")
        return self._read(name)

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, 1, "add")

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, -1, "subtract")

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise TrainingError(f"a task vector times {factor}: give a finite number")
        factor = float(factor)

        def scaled(name: str) -> Tensor:
            return (wide(self._read(name)) * factor).to(self.layout[name].dtype)

        origin = {"operation": "scale", "by": factor, "of": [self.provenance]}
        return TaskVector(self.layout, scaled, origin)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1

    def _combined(self, other: TaskVector, sign: int, operation: str) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        refuse_misfits({"first": self.layout, "second": other.layout}, dtypes=True)

        def combined(name: str) -> Tensor:
            total = wide(self._read(name)) + sign * wide(other._read(name))
            return total.to(self.layout[name].dtype)

        origin = {"operation": operation, "of": [self.provenance, other.provenance]}
        return TaskVector(self.layout, combined, origin)

    def in_memory(self, *, progress: bool = True) -> TaskVector:
        """The same vector with all its tensors computed."""
        names = progress_bar(self.layout, "computing a task vector", progress)
        return TaskVector.from_tensors({n: self._read(n) for n in names}, self.provenance)

    def save(self, path: Path | str, *, progress: bool = True, **facts: Any) -> Path:
        """Write one safetensors file, a tensor at a time, with the provenance in its metadata.

        `facts` (a notebook's name, say) join the provenance. Raises ArtefactError if the disk has
        no room for it. What was there before stays until the new file is whole.
        """
        path = Path(path)
        text = as_json({**self.provenance, **provenance(), **facts})
        header: dict[str, Any] = {"__metadata__": {"format": "pt", _KEY: text}}
        end = 0
        for name, tensor in self.layout.items():
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _STORED[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)  # so that the tensors are aligned
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < end + len(described):
            raise ArtefactError(
                f"{path} takes {end / 1e9:.1f} GB, but there are {free / 1e9:.1f} GB free: make "
                "room, or write elsewhere"
            )
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(len(described).to_bytes(8, "little") + described)
            for name in progress_bar(self.layout, f"writing {path.name}", progress):
                values = self._read(name).contiguous().reshape(-1)
                file.write(memoryview(values.view(torch.uint8).numpy()))
        return path

    def apply(self, model: LanguageModel | nn.Module, scale: float = 1.0) -> Applied:
        """Add scale * vector to a live model, in place: W <- W + scale * tau, rounded once.

        Returns what takes it back exactly: `with vector.apply(model, 0.5): ...`, or `.undo()`.
        Weights of the model that are not in the vector are left alone.

        Raises TrainingError, naming everything that does not fit, before anything is changed; and
        if a weight would no longer be finite, with the model as it was.
        """
        model = model.model if isinstance(model, LanguageModel) else model
        held = dict(model.state_dict())
        targets = {name: held[name] for name in self.layout if name in held}
        refuse_misfits({"vector": self.layout, "model": targets}, dtypes=False)
        if tied := set(targets) - set(distinct(targets)):
            raise TrainingError(
                f"{shortened(sorted(tied))} would be changed twice: tied in this model"
            )
        if not math.isfinite(scale):
            raise TrainingError(f"scale is {scale}: give a finite number")
        applied = Applied(model)
        try:
            for name, weight in targets.items():
                delta = wide(self._read(name).to(weight.device))
                changed = (wide(weight) + scale * delta).to(weight.dtype)
                if not torch.isfinite(changed).all():
                    raise TrainingError(
                        f"{name} would not be finite in {weight.dtype}: choose a smaller scale "
                        f"than {scale}"
                    )
                applied.write(name, weight, changed)
        except BaseException:
            applied.restore()
            raise
        return applied
