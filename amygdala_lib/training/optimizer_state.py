"""What Apollo remembers, in a file: moments as safetensors, everything else in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..artefacts import FORMAT_VERSION, as_json, provenance, read_tensors, write_tensors
from ..errors import ArtefactError, TrainingError
from .projection import is_projected, moment_shape

if TYPE_CHECKING:
    from .apollo import Apollo

MADE_BY = "`Apollo.save_state`"
KEY = "apollo"  # of the description in the file's metadata
_PARAMETERS = ("params", "param_names")  # in a group: all else is settings
_SHOWN = 5  # names in a message


def save(optimizer: Apollo, path: Path) -> Path:
    """Write settings, names, shapes, step counts and moments; see `Apollo.save_state`."""
    tensors: dict[str, Tensor] = {}
    groups = {id(group): _described(group) for group in optimizer.param_groups}
    is_writer = True
    for name, weight, group in optimizer.members():
        state = optimizer.state.get(weight, {})
        groups[id(group)]["parameters"].append(
            {"name": name, "shape": list(weight.shape), "step": state.get("step")}
        )
        if isinstance(weight, DTensor):
            is_writer = torch.distributed.get_rank() == 0
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = _whole(value)
    if is_writer:
        write_tensors(path, tensors, {KEY: as_json(provenance(groups=list(groups.values())))})
    return path


def load(optimizer: Apollo, path: Path) -> None:
    """Check all of a file, then take it over; see `Apollo.load_state`."""
    tensors, metadata = read_tensors(path, MADE_BY)
    try:
        description = json.loads(metadata[KEY])
        version, groups = description["format_version"], description["groups"]
        state_dict, shapes = _as_state_dict(groups, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path} is not what {MADE_BY} writes ({error!r}): start without it, or load another"
        ) from error
    if version > FORMAT_VERSION:
        raise ArtefactError(
            f"{path} has format {version}, this library reads up to {FORMAT_VERSION}: update it"
        )
    if problems := differences(optimizer, state_dict, shapes):
        raise TrainingError(f"{path} does not fit:\n" + "\n".join(problems))
    optimizer.load_state_dict(state_dict)


def check_fit(optimizer: Apollo, state_dict: Mapping[str, Any]) -> None:
    """Raises TrainingError with all differences if a state is not of these parameters and ranks."""
    if problems := differences(optimizer, state_dict):
        raise TrainingError("the state does not fit:\n" + "\n".join(problems))


def differences(
    optimizer: Apollo,
    state_dict: Mapping[str, Any],
    shapes: Mapping[int, Sequence[int]] | None = None,
) -> list[str]:
    """How a state differs from an optimizer, both values in each line; [] if it can be loaded.

    `shapes` are of the weights that the state is of, where they are known.
    """
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if strange := [n for n, group in enumerate(saved_groups) if "rank" not in group]:
        return [f"groups {strange} of the state have no rank: it is of another optimizer"]
    saved, own = _names(saved_groups), _names(groups)
    if saved != own:
        return _different_names(sum(saved, []), sum(own, []), (len(saved), len(own)))
    problems = [
        f"rank: {theirs['rank']} in the state, {ours['rank']} in the optimizer: "
        f"make the optimizer with rank={theirs['rank']}, or start without the state"
        for theirs, ours in zip(saved_groups, groups, strict=True)
        if theirs["rank"] != ours["rank"]
    ]
    unlike = []
    for number, (name, weight, group) in zip(numbers(state_dict), optimizer.members(), strict=True):
        state, shape = state_dict["state"].get(number, {}), tuple(weight.shape)
        if shapes is not None and tuple(shapes[number]) != shape:
            unlike.append(f"{name}: {tuple(shapes[number])} in the state, {shape} in the optimizer")
        elif state and not problems:
            unlike += _unlike(name, state, shape, group["rank"])
    if len(unlike) > _SHOWN:
        unlike[_SHOWN:] = [f"and {len(unlike) - _SHOWN} more"]
    return problems + unlike


def numbers(state_dict: Mapping[str, Any]) -> list[int]:
    """What a state calls its parameters, in their order."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def placed(value: Tensor, weight: Tensor) -> Tensor:
    """A copy of a moment where the weight is, and sharded as that is if it has its shape."""
    if isinstance(weight, DTensor) and not isinstance(value, DTensor):
        value = value.to(weight.device)
        if value.shape == weight.shape:
            mesh, placements = weight.device_mesh, weight.placements
            return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value.detach().to(weight.device, copy=True)


def _described(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, and room for its parameters."""
    settings = {key: value for key, value in group.items() if key not in _PARAMETERS}
    settings["lr"] = float(group["lr"])
    return {"settings": settings, "named": "param_names" in group, "parameters": []}


def _as_state_dict(
    groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """A file's content as torch has it, and the shapes of the weights by number."""
    found: dict[str, Any] = {"state": {}, "param_groups": []}
    shapes: dict[int, list[int]] = {}
    for group in groups:
        settings = group["settings"] | {"betas": tuple(group["settings"]["betas"]), "params": []}
        if group["named"]:
            settings["param_names"] = [parameter["name"] for parameter in group["parameters"]]
        for parameter in group["parameters"]:
            number = len(shapes)
            shapes[number] = parameter["shape"]
            settings["params"].append(number)
            if parameter["step"] is not None:
                moments = ["exp_avg", "exp_avg_sq"]
                if is_projected(parameter["shape"], settings["rank"]):
                    moments.append("update_norm")
                found["state"][number] = {"step": parameter["step"]} | {
                    moment: tensors[f"{parameter['name']}.{moment}"] for moment in moments
                }
        found["param_groups"].append(settings)
    return found, shapes


def _names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of each group's parameters; their numbers if they have none."""
    names, number = [], 0
    for group in groups:
        count = len(group["params"])
        names.append(list(group.get("param_names") or map(str, range(number, number + count))))
        number += count
    return names


def _different_names(saved: list[str], own: list[str], groups: tuple[int, int]) -> list[str]:
    problems = []
    for these, those, which, other in (
        (saved, own, "state", "optimizer"),
        (own, saved, "optimizer", "state"),
    ):
        held = set(those)
        if absent := [name for name in these if name not in held]:
            shown = ", ".join(absent[:_SHOWN]) + (", ..." if len(absent) > _SHOWN else "")
            problems.append(
                f"{len(absent)} of the {which}'s {len(these)} parameters are not in the {other}: "
                f"{shown}"
            )
    return problems or [
        f"the parameters are the same, but in another order or in other groups ({groups[0]} in the "
        f"state, {groups[1]} in the optimizer)"
    ]


def _unlike(name: str, state: Mapping[str, Any], shape: tuple, rank: int | None) -> list[str]:
    """What of a parameter's state is missing or of another shape than it would be."""
    wanted = dict.fromkeys(("exp_avg", "exp_avg_sq"), moment_shape(shape, rank))
    if is_projected(shape, rank):
        wanted["update_norm"] = (wanted["exp_avg"][0], 1, 1)
    lacking = [f"{name}: no {key} in the state" for key in ("step", *wanted) if key not in state]
    return lacking + [
        f"{name}.{key}: {tuple(state[key].shape)} in the state, {expected} in the optimizer"
        for key, expected in wanted.items()
        if key in state and tuple(state[key].shape) != expected
    ]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
