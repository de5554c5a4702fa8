"""Steering: add concept directions to the residual stream while a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .directions import Directions
from .errors import ModelError, SteeringError
from .models import EMBEDDING, LanguageModel, check_layers, find_layers


@contextmanager
def steer(
    lm: LanguageModel | PreTrainedModel,
    directions: Directions,
    strengths: Mapping[str, float],
    *,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Within the block, every forward adds the named concepts at every position.

    x_t += strength * residual_norm(layer) * v_concept, summed over the concepts, at each of
    `layers` (all layers of `directions` by default; one or two are usually best). Strengths are in
    units of the layer's mean residual norm; negative ones push away; 0 changes nothing, to the bit.
    Blocks nest, and the model is as before when one is left, by an exception too.

    Raises SteeringError, naming everything that is wrong, before any hook is set.
    """
    model, blocks = (
        (lm.model, lm.layers) if isinstance(lm, LanguageModel) else (lm, find_layers(lm))
    )
    hidden_size = model.config.get_text_config().hidden_size
    chosen = _check(hidden_size, len(blocks), directions, strengths, layers)
    active = {directions.index(concept): s for concept, s in strengths.items() if s != 0}
    hooks = []
    try:
        for layer in chosen if active else []:
            vectors = directions.vectors[layer][list(active)]
            weights = torch.tensor(list(active.values()), dtype=vectors.dtype)
            hooks.append(_add(blocks, layer, directions.residual_norms[layer] * weights @ vectors))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(blocks: nn.ModuleList, layer: int, push: Tensor) -> torch.utils.hooks.RemovableHandle:
    placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def pushed(hidden: Tensor) -> Tensor:
        where = hidden.device, hidden.dtype
        if where not in placed:
            placed[where] = push.to(*where)
        return hidden + placed[where]

    def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (pushed(output[0]), *output[1:]) if isinstance(output, tuple) else pushed(output)

    def embedding_hook(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
        if inputs:
            return (pushed(inputs[0]), *inputs[1:]), keywords
        return inputs, keywords | {"hidden_states": pushed(keywords["hidden_states"])}

    if layer == EMBEDDING:
        return blocks[0].register_forward_pre_hook(embedding_hook, with_kwargs=True)
    return blocks[layer].register_forward_hook(hook)


def _check(
    hidden_size: int,
    n_layers: int,
    directions: Directions,
    strengths: Mapping[str, float],
    layers: Iterable[int] | None,
) -> list[int]:
    """The layers in order; raises SteeringError with all that is wrong."""
    problems, chosen = [], []
    if unknown := [concept for concept in strengths if concept not in directions.concepts]:
        problems.append(
            f"no direction for {', '.join(unknown)}: there are {', '.join(directions.concepts)}"
        )
    if wild := {
        c: s for c, s in strengths.items() if not (isinstance(s, Real) and math.isfinite(s))
    }:
        problems.append(f"strengths must be finite numbers: {wild}")
    if directions.hidden_size != hidden_size:
        made_for = directions.provenance.get("model", "another model")
        problems.append(
            f"directions of {directions.hidden_size} do not fit a residual stream of "
            f"{hidden_size}: they were made for {made_for}"
        )
    try:
        chosen = check_layers(directions.layers if layers is None else layers, n_layers)
    except ModelError as error:
        problems.append(str(error))
    if absent := [layer for layer in chosen if layer not in directions.vectors]:
        problems.append(f"no directions at layers {absent}: there are {directions.layers}")
    elif normless := [layer for layer in chosen if layer not in directions.residual_norms]:
        problems.append(f"no residual norm for layers {normless}: extract the directions again")
    if problems:
        raise SteeringError("\n".join(problems))
    return chosen
