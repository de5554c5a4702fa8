"""Mapping: the tensors a server holds, as views by the names Hugging Face has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import LiveError

Shapes = Mapping[str, tuple[int, ...]]

MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linear layers that vLLM keeps as one: the rows of these, in this order."""

EXPERTS = {
    "experts.gate_up_proj": "experts.routed_experts.w13_weight",
    "experts.down_proj": "experts.routed_experts.w2_weight",
}
"""Expert weights by their Hugging Face names, and vLLM's."""

VOCABULARY = ("embed_tokens", "lm_head")
"""Layers with a row per token, to which vLLM adds rows to make their number round."""

FAMILIES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Model types whose tensors in vLLM were compared with those on disk, bit by bit.

Others may keep the same names and shapes and another order of rows, as GPT-NeoX does, so that a
mapping by names alone would be wrong without anyone noticing.
"""

_LANGUAGE = "language_model."
_PART_OF = {part: merged for merged, parts in MERGED.items() for part in parts}
_MOST_SAID = 40


class Rows(NamedTuple):
    """Rows `start` to `stop` of what the server calls `name`."""

    name: str
    start: int
    stop: int


def map_weights(
    config: PretrainedConfig,
    served: Mapping[str, Tensor],
    wanted: Shapes,
    *,
    naming: str = "vllm",
) -> dict[str, Tensor]:
    """A view of the server's memory for every wanted weight.

    `config` is of the model, `served` has the server's tensors by its names (tied ones by all of
    them), `wanted` the shapes by their Hugging Face names (tied ones by one of them). `naming` is
    "transformers" if the server goes by these names, too. Each view has a version counter of its
    own. A server of a model with several towers may hold more than its language model: the others
    are left alone.

    Raises LiveError, with the whole list, unless every wanted weight is found in its shape and
    every row of every tensor of the language model is given out exactly once, those that pad the
    vocabulary aside.
    """
    if naming == "vllm":
        _check_family(config)
        served = _language_model(served)
    places, problems = {}, []
    for name, shape in wanted.items():
        found = _place(name, shape, served, wanted, naming)
        if isinstance(found, str):
            problems.append(found)
        else:
            places[name] = found
    problems += _not_once(served, places.values())
    if problems:
        raise _unmapped(config, problems)
    return {name: _view(served[rows.name], rows) for name, rows in places.items()}


def _check_family(config: PretrainedConfig) -> None:
    family = config.get_text_config().model_type
    if family not in FAMILIES:
        raise LiveError(
            f"how vLLM keeps the weights of {family!r} models has not been checked; checked are "
            f"{', '.join(sorted(FAMILIES))}"
        )


def _language_model(served: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Only the language model of a model with several towers, without its prefix."""
    found = {
        name.removeprefix(_LANGUAGE): tensor
        for name, tensor in served.items()
        if name.startswith(_LANGUAGE)
    }
    return found or served


def _place(
    name: str, shape: tuple[int, ...], served: Mapping[str, Tensor], wanted: Shapes, naming: str
) -> Rows | str:
    """Where a wanted weight lies, or what is wrong with it."""
    if naming == "transformers" or name in served:
        return _whole(name, name, shape, served, padded=naming == "vllm" and _per_token(name))
    for ending, theirs in EXPERTS.items():
        if name.endswith(f".{ending}"):
            return _whole(name, name.removesuffix(ending) + theirs, shape, served)
    *path, layer, kind = name.split(".")
    if layer not in _PART_OF:
        return f"{name} {list(shape)} is not served"
    return _part(name, ".".join([*path, "{}", kind]), layer, shape, served, wanted)


def _whole(
    name: str,
    theirs: str,
    shape: tuple[int, ...],
    served: Mapping[str, Tensor],
    *,
    padded: bool = False,
) -> Rows | str:
    if theirs not in served:
        return f"{name} {list(shape)} is not served" + _as(theirs, name)
    found = tuple(served[theirs].shape)
    if found == shape or (padded and found[1:] == shape[1:] and found[0] > shape[0]):
        return Rows(theirs, 0, shape[0] if shape else 1)
    return f"{name} is {list(found)} in the server{_as(theirs, name)}, not {list(shape)}"


def _part(
    name: str,
    pattern: str,
    layer: str,
    shape: tuple[int, ...],
    served: Mapping[str, Tensor],
    wanted: Shapes,
) -> Rows | str:
    """Rows of a layer that the server keeps as one with others; `pattern` has {} for its name."""
    parts = MERGED[_PART_OF[layer]]
    theirs = pattern.format(_PART_OF[layer])
    if theirs not in served:
        return f"{name} {list(shape)} is not served{_as(theirs, name)}"
    shapes = [wanted.get(pattern.format(part)) for part in parts]
    if None in shapes:
        missing = ", ".join(part for part, found in zip(parts, shapes, strict=True) if not found)
        return f"{name} is one with {missing} in the server, which this model does not have"
    rows = [found[0] for found in shapes]
    whole = (sum(rows), *shape[1:])
    if tuple(served[theirs].shape) != whole:
        return f"{name} is in {theirs} {list(served[theirs].shape)}, which is not {list(whole)}"
    before = sum(rows[: parts.index(layer)])
    return Rows(theirs, before, before + shape[0])


def _per_token(name: str) -> bool:
    """Whether a weight has a row per token, and may have more for none."""
    return name.endswith(tuple(f"{layer}.weight" for layer in VOCABULARY))


def _as(theirs: str, name: str) -> str:
    return "" if theirs == name else f" as {theirs}"


def _not_once(served: Mapping[str, Tensor], places: Iterable[Rows]) -> list[str]:
    """Tensors of the server of which rows are given out twice, or not at all."""
    names: dict[int, list[str]] = {}  # of one tensor, by its identity
    for name, tensor in served.items():
        names.setdefault(id(tensor), []).append(name)
    given: dict[int, list[tuple[int, int]]] = {}
    for rows in places:
        given.setdefault(id(served[rows.name]), []).append((rows.start, rows.stop))
    problems = []
    for key, theirs in names.items():
        tensor = served[theirs[0]]
        n_rows = tensor.shape[0] if tensor.dim() else 1
        found = sorted(given.get(key, []))
        ends = [0, *(stop for _, stop in found)]
        if not found:
            problems.append(f"{theirs[0]} {list(tensor.shape)} is served and not used")
        elif any(start < end for (start, _), end in zip(found, ends, strict=False)):
            problems.append(f"rows of {theirs[0]} would be two weights at once")
        elif (used := sum(stop - start for start, stop in found)) != n_rows and not any(
            map(_per_token, theirs)
        ):
            problems.append(f"{n_rows - used} rows of {theirs[0]} are served and not used")
    return problems


def _view(tensor: Tensor, rows: Rows) -> Tensor:
    view = tensor[rows.start : rows.stop] if tensor.dim() else tensor
    # Through the storage, or all views of a tensor would count their versions together, and
    # autograd would take a step on one for a change of the others.
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _unmapped(config: PretrainedConfig, problems: Sequence[str]) -> LiveError:
    more = [f"(and {len(problems) - _MOST_SAID:,} more)"] if len(problems) > _MOST_SAID else []
    said = "\n".join([*problems[:_MOST_SAID], *more])
    return LiveError(
        f"the server's weights are not those of a {config.get_text_config().model_type} model as "
        "its config.json has it: serve the same folder, unquantised, with "
        f"--tensor-parallel-size 1:\n{said}"
    )
