"""Directions in the forms of other projects: `.npz`, control vectors in GGUF, steering-vectors."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..artefacts import provenance, replacing
from ..errors import AmygdalaError, ArtefactError
from ..models import EMBEDDING
from .directions import Directions

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

ARCHITECTURE = "controlvector"
"""What `general.architecture` is in a GGUF file of control vectors."""

_NO_KEY = re.compile(r"[/\\\0\ud800-\udfff]|\.npy\Z")
_LAYER = re.compile(r"direction\.(0|[1-9][0-9]*)")
_UNREADABLE = (
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy, zipfile and gguf raise on damaged files, depending on where the damage is: some claim
more than any memory holds."""


def write_npz(dirs: Directions, path: Path | str) -> Path:
    """Write the vectors of one layer as a numpy `.npz` of concept -> (hidden,) float32.

    The form in which replications publish emotion vectors. Same directions, same bytes. The layer,
    residual norms, means and deviations are not in it: `Directions.save` keeps all. Returns the
    path. Raises AmygdalaError unless there is exactly one layer, and for names that cannot be a
    key: repeated, empty, with a slash, a null or half a surrogate pair, or ending in `.npy`.
    """
    problems = []
    if len(dirs.layers) != 1:
        problems.append(
            f"a .npz has no place for layers, and these directions have {dirs.layers}: "
            f"choose one first, as in dirs.select(layers={dirs.layers[-1:]})"
        )
    if not dirs.concepts:
        problems.append("there is no concept to write: extract or select at least one")
    if repeated := [name for name, times in Counter(dirs.concepts).items() if times > 1]:
        problems.append(f"a key can stand once: select {', '.join(map(repr, repeated))} once")
    if wrong := [name for name in dirs.concepts if not name or _NO_KEY.search(name)]:
        problems.append(
            f"not possible as keys of a .npz: {', '.join(map(repr, wrong))}: use names without "
            "slashes and without .npy at the end"
        )
    if problems:
        raise AmygdalaError("\n".join(problems))
    path = Path(path)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for concept, vector in zip(dirs.concepts, dirs.vectors[dirs.layers[0]], strict=True):
            # np.savez has parameters, and so has no room for concepts, of names such as "file".
            # ZipInfo puts every file in 1980, whatever the time.
            with archive.open(zipfile.ZipInfo(f"{concept}.npy"), "w") as member:
                np.lib.format.write_array(member, vector.cpu().numpy(), allow_pickle=False)
    return path


def read_npz(path: Path | str, layer: int) -> Directions:
    """Directions of `layer` from a `.npz` of concept -> (hidden,) vector, of any float dtype.

    Vectors of any length become unit vectors, in float32 and in the order of the file. It says
    nothing of projections or residual norms, so that z-scores are raw projections, and steering
    needs `dataclasses.replace(dirs, residual_norms=acts.residual_norms)` first.

    Raises ArtefactError naming everything that is wrong: pickled objects (never loaded, as they can
    run code), other shapes, unequal lengths, NaN, infinities, zeros, or nothing there. Raises
    AmygdalaError for a layer below -1, the embeddings.
    """
    path = _existing(path)
    if layer < EMBEDDING:
        raise AmygdalaError(f"no layer {layer}: layers count from 0, and -1 is the embeddings")
    arrays, problems = _npz_arrays(path)
    _check_file(path, problems + _problems(arrays))
    units = torch.stack([_unit(array)[0] for array in arrays.values()])
    return _directions(list(arrays), {layer: units}, {}, file=path.name, format="npz")


def write_gguf(dirs: Directions, path: Path | str, model_type: str) -> Path:
    """Write one concept as a control vector for llama.cpp, as repeng does: `direction.<layer>`.

    Each (hidden,) float32 vector is as long as its layer's mean residual norm, so that
    `--control-vector-scaled FILE 0.5` pushes as hard as `steer` does at strength 0.5. llama.cpp
    adds `direction.<i>` to the output of block i, counted from 0 as here, and never to that of
    block 0 or to the embeddings. `model_type` (`lm.model.config.model_type`) is a hint to people.

    Returns the path. Raises AmygdalaError naming all that is wrong: another number of concepts than
    one, layers -1 or 0, no residual norm at a layer, no model type.
    """
    from gguf import GGUFWriter  # slow to import

    problems = _layer_problems(dirs, 1, "llama.cpp steers no layer before 1")
    problems += _norm_problems(dirs)
    if len(dirs.concepts) != 1:
        problems.append(
            f"a control vector is of one concept, and these directions have {len(dirs.concepts)} "
            f"({', '.join(dirs.concepts)}): write them one by one, as in "
            f"dirs.select(concepts={dirs.concepts[:1]})"
        )
    if not model_type:
        problems.append("model_type is empty: pass lm.model.config.model_type")
    if problems:
        raise AmygdalaError("\n".join(problems))
    path = Path(path)
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(dirs.layers))
            for layer, push in _pushes(dirs, dirs.concepts[0]).items():
                writer.add_tensor(f"direction.{layer}", push.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return path


def read_gguf(path: Path | str, concept: str) -> Directions:
    """Directions of one concept from a control vector of llama.cpp or repeng; see `write_gguf`.

    Unit vectors at the layers that the file has, which need not be all; `residual_norms` are the
    lengths found, so that a strength of 1 pushes as the file does at 1. z-scores are raw
    projections. Raises ArtefactError naming everything that is wrong: no GGUF file, one of another
    architecture, no direction in it, other shapes, unequal lengths, NaN, infinities, zeros.
    """
    path = _existing(path)
    architecture, hint, tensors = _gguf_content(path)
    if architecture != ARCHITECTURE:
        raise ArtefactError(
            f"{path} is a GGUF file of architecture {architecture!r}, not {ARCHITECTURE!r}: "
            "give a control vector, not a model or adapter"
        )
    problems = [f"{name} names no layer" for name in tensors if not _LAYER.fullmatch(name)]
    if not tensors:
        problems.append("there is no tensor direction.<layer>")
    _check_file(path, problems + _problems(tensors))
    found = {int(_LAYER.fullmatch(name)[1]): _unit(array) for name, array in tensors.items()}
    return _directions(
        [concept],
        {layer: unit[None] for layer, (unit, _) in found.items()},
        {layer: length for layer, (_, length) in found.items()},
        file=path.name,
        format="gguf",
        **({} if hint is None else {"model_hint": hint}),
    )


def to_steering_vector(dirs: Directions, concept: str) -> SteeringVector:
    """One concept for the steering-vectors library: its multiplier is then our strength.

    `layer_activations[layer]`, (hidden,) float32, is the unit vector times the layer's mean
    residual norm. Raises AmygdalaError for an unknown concept, for layer -1 (the library steers
    the outputs of blocks only), without residual norms, or, with the command that installs it, if
    the library is not there.
    """
    try:
        from steering_vectors import SteeringVector
    except ModuleNotFoundError as error:
        raise AmygdalaError("pip install --no-deps -r requirements-nodeps.txt") from error
    problems = _layer_problems(dirs, 0, "steering-vectors steers the outputs of blocks only")
    if problems := problems + _norm_problems(dirs):
        raise AmygdalaError("\n".join(problems))
    return SteeringVector(_pushes(dirs, concept), layer_type="decoder_block")


def from_steering_vectors(vectors: Mapping[str, SteeringVector]) -> Directions:
    """Directions from vectors of the steering-vectors library, by concept.

    Unit vectors in float32; `residual_norms` are the mean lengths over the concepts at each layer.
    z-scores are raw projections. Raises AmygdalaError naming everything that is wrong: vectors of
    something else than decoder blocks, layers or hidden sizes that differ between concepts,
    negative layers (which count from the end there), other shapes, NaN, infinities, zeros.
    """
    arrays = {
        (concept, layer): activation.detach().float().cpu().numpy()
        for concept, vector in vectors.items()
        for layer, activation in vector.layer_activations.items()
    }
    layers = {concept: sorted(vector.layer_activations) for concept, vector in vectors.items()}
    problems = [
        f"{concept} is of {vector.layer_type}: train it with layer_type='decoder_block'"
        for concept, vector in vectors.items()
        if vector.layer_type != "decoder_block"
    ]
    problems += [
        f"{concept} has layers {negative}: count them from 0"
        for concept, found in layers.items()
        if (negative := [layer for layer in found if layer < 0])
    ]
    problems += _unequal({concept: str(found) for concept, found in layers.items()}, "layers")
    problems += _problems({f"{c} at layer {layer}": array for (c, layer), array in arrays.items()})
    if not arrays:
        problems.append("there is no steering vector with a layer: give one for each concept")
    if problems:
        raise AmygdalaError("\n".join(problems))
    found = {key: _unit(array) for key, array in arrays.items()}
    shared = next(iter(layers.values()))
    return _directions(
        list(vectors),
        {n: torch.stack([found[concept, n][0] for concept in vectors]) for n in shared},
        {n: sum(found[concept, n][1] for concept in vectors) / len(vectors) for n in shared},
        format="steering-vectors",
    )


def _directions(
    concepts: list[str],
    vectors: dict[int, Float[Tensor, "concepts hidden"]],
    residual_norms: dict[int, float],
    **origin: Any,
) -> Directions:
    """Directions of which no projections are known: z-scores are raw projections."""
    return Directions(
        concepts=concepts,
        vectors=vectors,
        residual_norms=residual_norms,
        means={layer: torch.zeros(len(concepts)) for layer in vectors},
        stds={layer: torch.ones(len(concepts)) for layer in vectors},
        provenance=provenance(**origin),
    )


def _pushes(dirs: Directions, concept: str) -> dict[int, Float[Tensor, " hidden"]]:
    """What steering adds at strength 1, by layer."""
    row = dirs.index(concept)
    return {n: dirs.residual_norms[n] * dirs.vectors[n][row].cpu() for n in dirs.layers}


def _unit(array: np.ndarray) -> tuple[Float[Tensor, " hidden"], float]:
    """A vector at unit length, and the length that it had.

    One that is at unit length but for rounding stays as it is: what was written is read to the bit.
    """
    vector = torch.from_numpy(_float32(array))
    peak = vector.abs().max()
    # The square of a very short or long vector's length is beyond float32.
    shape = vector / peak
    length = peak.item() * shape.norm().item()
    return (vector if abs(length - 1) < 1e-6 else shape / shape.norm()), length


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinite then, and refused for it
        return array.astype(np.float32)


# What is wrong


def _layer_problems(dirs: Directions, first: int, because: str) -> list[str]:
    kept = [layer for layer in dirs.layers if layer >= first]
    if not kept:
        return [
            f"{because}, and there are only layers {dirs.layers}: extract at later ones, then keep "
            "those with dirs.select(layers=[...])"
        ]
    if early := [layer for layer in dirs.layers if layer < first]:
        return [f"{because}: leave out {early} with dirs.select(layers={kept})"]
    return []


def _norm_problems(dirs: Directions) -> list[str]:
    norms = {layer: dirs.residual_norms.get(layer, 0) for layer in dirs.layers}
    unusable = [layer for layer, norm in norms.items() if not 0 < norm < math.inf]
    if unusable:
        return [f"no residual norm for layers {unusable}: extract the directions again"]
    return []


def _problems(arrays: Mapping[str, Any]) -> list[str]:
    """What keeps arrays from being directions of one model, by name."""
    defects = {name: _defect(array) for name, array in arrays.items()}
    sizes = {name: len(array) for name, array in arrays.items() if array.ndim == 1}
    named = [f"{name} {defect}" for name, defect in defects.items() if defect]
    return named + _unequal(sizes, "hidden size")


def _defect(array: np.ndarray) -> str | None:
    if array.dtype.kind != "f":
        return f"holds {array.dtype}, not floating point numbers"
    if array.ndim != 1:
        return f"is of shape {array.shape}, not (hidden,)"
    values = _float32(array)
    if not np.isfinite(values).all():
        return "holds NaN, or numbers that are infinite in float32"
    if not values.any():
        return "is zero in float32, which is no direction"
    return None


def _unequal(values: Mapping[str, int | str], what: str) -> list[str]:
    """A line for each name whose value is not the most frequent one, with a name that has that."""
    usual = {value for value, _ in Counter(values.values()).most_common(1)}
    example = next((f"{name} has {value}" for name, value in values.items() if value in usual), "")
    return [
        f"{name} has {what} {value}, but {example}"
        for name, value in values.items()
        if value not in usual
    ]


# Files


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"{path} is not there, or is no file: give the path of one")
    return path


def _check_file(path: Path, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(problems)
        raise ArtefactError(
            f"{path} cannot be read as directions: write it again, as finite float vectors "
            f"(hidden,) of one hidden size\n{lines}"
        )


def _npz_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the file by name, and what is wrong with the others."""
    arrays, problems = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    problems.append(f"{name} is there twice")
                try:
                    with archive.open(member) as file:
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                except _UNREADABLE as error:
                    problems.append(f"{name} cannot be read ({error})")
    except _UNREADABLE as error:
        raise ArtefactError(
            f"{path} is not a .npz file, or is damaged ({error}): write it again with write_npz or "
            "numpy.savez"
        ) from error
    if not arrays and not problems:
        problems.append("the file is empty")
    return arrays, problems


def _gguf_content(path: Path) -> tuple[str | None, str | None, dict[str, np.ndarray]]:
    """Architecture, model hint, and the tensors whose names begin with `direction.`."""
    from gguf import GGUFReader  # slow to import

    try:
        reader = GGUFReader(path)
        keys = ("general.architecture", f"{ARCHITECTURE}.model_hint")
        fields = [reader.get_field(key) for key in keys]
        architecture, hint = [field.contents() if field else None for field in fields]
        tensors = {
            tensor.name: np.array(tensor.data)  # a copy, or the file would stay open
            for tensor in reader.tensors
            if tensor.name.startswith("direction.")
        }
    except _UNREADABLE as error:
        raise ArtefactError(
            f"{path} is not a GGUF file, or is damaged ({error}): write it again with write_gguf "
            "or repeng's export_gguf"
        ) from error
    return architecture, hint, tensors
