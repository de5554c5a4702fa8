"""Directions: a unit vector per concept and layer, and the files they are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..artefacts import as_json, provenance, read_json, read_tensors, replacing, write_tensors
from ..errors import AmygdalaError, ArtefactError


@dataclass(frozen=True, eq=False)
class Directions:
    """A unit vector per concept and layer.

    `vectors[layer]` is (n_concepts, hidden) float32, rows in the order of `concepts`.
    `residual_norms[layer]` is the layer's mean residual norm, the unit of steering strength.
    `means[layer]` and `stds[layer]`, (n_concepts,), are of the texts' projections, for z-scores.
    `eigenvalues[layer]`, (n_concepts, n) in descending order, are there if the method has any.
    """

    concepts: list[str]
    vectors: dict[int, Float[Tensor, "concepts hidden"]]
    residual_norms: dict[int, float]
    means: dict[int, Float[Tensor, " concepts"]]
    stds: dict[int, Float[Tensor, " concepts"]]
    provenance: dict[str, Any] = field(default_factory=dict)
    eigenvalues: dict[int, Float[Tensor, "concepts n"]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted(self.vectors)

    @property
    def hidden_size(self) -> int:
        return self.vectors[self.layers[0]].shape[1]

    def index(self, concept: str) -> int:
        """The row of a concept. Raises AmygdalaError if it has no direction."""
        if concept not in self.concepts:
            raise AmygdalaError(
                f"no direction for {concept!r}: there are {', '.join(self.concepts)}"
            )
        return self.concepts.index(concept)

    def select(
        self, concepts: Iterable[str] | None = None, layers: Iterable[int] | None = None
    ) -> Directions:
        """The same directions for these concepts, in this order, and these layers; None keeps all.

        Raises AmygdalaError for a concept or layer that is not there.
        """
        concepts = self.concepts if concepts is None else list(concepts)
        layers = self.layers if layers is None else sorted(layers)
        if absent := [layer for layer in layers if layer not in self.vectors]:
            raise AmygdalaError(f"no directions at layers {absent}: there are {self.layers}")
        rows = [self.index(concept) for concept in concepts]

        def kept(held: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: held[layer][rows] for layer in layers if layer in held}

        return replace(
            self,
            concepts=concepts,
            vectors=kept(self.vectors),
            residual_norms={n: v for n, v in self.residual_norms.items() if n in layers},
            means=kept(self.means),
            stds=kept(self.stds),
            eigenvalues=kept(self.eigenvalues),
        )

    def similarity(self, layer: int) -> Float[Tensor, "concepts concepts"]:
        """Cosines between all pairs of concepts at one layer."""
        return self.vectors[layer] @ self.vectors[layer].T

    def save(self, folder: Path | str, **facts: Any) -> Path:
        """Write `readout.safetensors` and `readout.json` into `folder`, which is made if need be.

        `facts` (a notebook's name, say) join the provenance. Returns the folder. Raises
        ArtefactError for a fact that JSON cannot hold; what was there before is then left alone.
        Other forms are in `amygdala_lib.directions.exchange`.
        """
        folder = Path(folder)
        tensors = {}
        for layer in self.layers:
            tensors[f"layer_{layer}.vectors"] = self.vectors[layer]
            tensors[f"layer_{layer}.mean"] = self.means[layer]
            tensors[f"layer_{layer}.std"] = self.stds[layer]
            if layer in self.eigenvalues:
                tensors[f"layer_{layer}.eigenvalues"] = self.eigenvalues[layer]
        written_by = ("format_version", "versions")
        origin = {k: v for k, v in self.provenance.items() if k not in written_by}
        description = {
            "concepts": self.concepts,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "dtype": "float32",
            "residual_norms": {str(layer): norm for layer, norm in self.residual_norms.items()},
            **provenance(**origin),
            **facts,
        }
        with replacing(folder / "readout.json") as temporary:
            temporary.write_text(as_json(description), encoding="utf-8")
            # The names again, so that vectors never go by the names of another run.
            names = {"concepts": json.dumps(self.concepts)}
            write_tensors(folder / "readout.safetensors", tensors, names)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Directions:
        """Read what `save` wrote; see `Readout.load` for how little is enough.

        Raises ArtefactError if a file is missing, damaged or does not fit the other.
        """
        folder = Path(folder)
        made_by = "`amy.extract(...).save(folder)` (notebook 02)"
        description = read_json(folder / "readout.json", made_by)
        tensors, names = read_tensors(folder / "readout.safetensors", made_by)
        lacking = [k for k in ("concepts", "layers", "hidden_size") if k not in description]
        layers = description.get("layers", [])
        lacking += [key for n in layers if (key := f"layer_{n}.vectors") not in tensors]
        if lacking:
            raise ArtefactError(
                f"{folder} lacks {', '.join(lacking)}: write it again with {made_by}"
            )
        concepts = description["concepts"]
        shape = (len(concepts), description["hidden_size"])
        vectors = {layer: tensors[f"layer_{layer}.vectors"].float() for layer in layers}
        wrong = {layer: tuple(v.shape) for layer, v in vectors.items() if tuple(v.shape) != shape}
        if wrong or json.loads(names.get("concepts", "null")) not in (None, concepts):
            raise ArtefactError(
                f"{folder}: readout.json says {shape} per layer for {', '.join(concepts)}, but the "
                f"tensors are {wrong or 'of other concepts'}: the two files are not from one run; "
                f"write them again with {made_by}"
            )
        known = {"concepts", "layers", "hidden_size", "dtype", "residual_norms"}
        return cls(
            concepts=concepts,
            vectors=vectors,
            residual_norms={int(k): v for k, v in description.get("residual_norms", {}).items()},
            means={k: tensors.get(f"layer_{k}.mean", torch.zeros(shape[0])) for k in layers},
            stds={k: tensors.get(f"layer_{k}.std", torch.ones(shape[0])) for k in layers},
            provenance={k: v for k, v in description.items() if k not in known},
            eigenvalues={
                k: tensors[name] for k in layers if (name := f"layer_{k}.eigenvalues") in tensors
            },
        )
