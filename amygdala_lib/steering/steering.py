"""Steering: change the residual stream along concept directions while a model runs."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..directions import Directions
from ..errors import ModelError, SteeringError
from ..models import EMBEDDING, LanguageModel, check_layers, find_layers
from .interventions import Intervention, add, clamp, project_out
from .positions import Positions, Tokens, sentence_ends

Mode = Literal["add", "project_out", "clamp"]


@contextmanager
def steer(
    lm: LanguageModel | PreTrainedModel,
    directions: Directions,
    strengths: Mapping[str, float] | Iterable[str],
    *,
    layers: Iterable[int] | None = None,
    tokens: Tokens = "all",
    mode: Mode = "add",
    allow_other_model: bool = False,
) -> Iterator[None]:
    """Within the block, every forward has the named concepts added, removed or held at a level.

    At each of `layers` (all layers of `directions` by default; one or two are usually best):

    - `add`: x_t += strength * residual_norm(layer) * v_concept, summed over the concepts. Negative
      strengths push away; 0 changes nothing, to the bit.
    - `clamp`: the projection of x_t on v_concept becomes strength * residual_norm(layer), for all
      concepts at once, by the smallest change that does it. 0 removes a concept.
    - `project_out`: what x_t has in the span of the concepts is removed. `strengths` is then a list
      of names, ["sad"].

    `tokens` says where: at "all" positions; at those "generated" within the block by `generate`
    (so the first new token, which the prompt's last position predicts, is chosen as without
    steering); at each "sentence_end", the tokens whose text ends in `.`, `!`, `?` or `…`; or at
    slice(start, stop) of each text, counted from 0 at its first token that is not padding.

    Blocks nest, each changing what those around it left; the model is as before when one is left,
    by an exception too. A bare Hugging Face model will do, but for `sentence_end`, which needs the
    tokenizer. Directions of a model of another name are refused unless `allow_other_model` (if it
    was trained from that one, say); those of another size always are.

    Raises SteeringError, naming everything that is wrong, before any hook is set.
    """
    model, blocks = (
        (lm.model, lm.layers) if isinstance(lm, LanguageModel) else (lm, find_layers(lm))
    )
    problems = _unfit(lm, len(blocks), directions, allow_other_model)
    problems += _wrong_tokens(lm, tokens)
    wanted = _strengths(directions, strengths, mode, problems)
    chosen = _layers(len(blocks), directions, layers, problems)
    changes = {} if problems else _interventions(directions, wanted, chosen, mode, problems)
    if problems:
        raise SteeringError("\n".join(problems))
    with ExitStack() as hooks:
        if changes and tokens != "all":
            ends = None
            if tokens == "sentence_end":
                ends = sentence_ends(lm.tokenizer, model.get_input_embeddings().num_embeddings)
            positions = Positions(tokens, ends)
            hooks.enter_context(positions.watching(model))
            changes = {layer: positions.limit(change) for layer, change in changes.items()}
        for layer, change in changes.items():
            hooks.callback(_set(blocks, layer, change).remove)
        yield


def _set(
    blocks: nn.ModuleList, layer: int, change: Intervention
) -> torch.utils.hooks.RemovableHandle:
    def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def embedding_hook(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), keywords
        return inputs, keywords | {"hidden_states": change(keywords["hidden_states"])}

    if layer == EMBEDDING:
        return blocks[0].register_forward_pre_hook(embedding_hook, with_kwargs=True)
    return blocks[layer].register_forward_hook(hook)


def _interventions(
    directions: Directions,
    strengths: Mapping[str, float],
    layers: Sequence[int],
    mode: Mode,
    problems: list[str],
) -> dict[int, Intervention]:
    """What to do at each layer; none where nothing would change."""
    if mode == "add":
        strengths = {concept: s for concept, s in strengths.items() if s != 0}
    if not strengths:
        return {}
    rows = [directions.index(concept) for concept in strengths]
    changes = {}
    for layer in layers:
        vectors = directions.vectors[layer][rows]
        if mode == "project_out":
            changes[layer] = project_out(vectors)
            continue
        levels = directions.residual_norms[layer] * torch.tensor(
            list(strengths.values()), dtype=vectors.dtype
        )
        changes[layer] = add(levels @ vectors) if mode == "add" else clamp(vectors, levels)
    if beyond := [layer for layer, change in changes.items() if change is None]:
        problems.append(
            f"{', '.join(strengths)} are so alike at layers {beyond} that they cannot be held at "
            f"{', '.join(map(str, strengths.values()))}: clamp fewer of them, or nearer levels"
        )
    return changes


def _strengths(
    directions: Directions,
    strengths: Mapping[str, float] | Iterable[str],
    mode: Mode,
    problems: list[str],
) -> dict[str, float]:
    """By concept; 0 for those that are projected out."""
    if mode not in get_args(Mode):
        problems.append(f"no mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    if isinstance(strengths, str) or not isinstance(strengths, Iterable):
        how = "['calm']" if mode == "project_out" else "{'calm': 0.5}"
        problems.append(f"strengths is {strengths!r}: give concepts as in {how}")
        return {}
    if isinstance(strengths, Mapping) and mode == "project_out":
        problems.append(
            f"project_out takes names and no strengths: say {list(strengths)}, or use "
            "mode='clamp' to hold a concept at a level"
        )
    if not isinstance(strengths, Mapping) and mode in ("add", "clamp"):
        problems.append(f"{mode} needs a strength for each concept, as in {{'calm': 0.5}}")
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(strengths, 0.0)
    if unknown := [concept for concept in named if concept not in directions.concepts]:
        problems.append(_unknown(unknown, directions.concepts))
    if wild := {c: s for c, s in named.items() if not (isinstance(s, Real) and math.isfinite(s))}:
        problems.append(f"strengths must be finite numbers: {wild}")
    return dict(named)


def _unknown(names: Sequence[str], concepts: Sequence[str]) -> str:
    suggested = []
    for name in names:
        near = difflib.get_close_matches(str(name), concepts)
        suggested.append(f"{name} (did you mean {' or '.join(near)}?)" if near else str(name))
    there = ", ".join(concepts[:20]) + (f" and {len(concepts) - 20} more" * (len(concepts) > 20))
    return f"no direction for {', '.join(suggested)}: there are {there}"


def _layers(
    n_layers: int, directions: Directions, layers: Iterable[int] | None, problems: list[str]
) -> list[int]:
    try:
        chosen = check_layers(directions.layers if layers is None else layers, n_layers)
    except ModelError as error:
        problems.append(str(error))
        return []
    if absent := [layer for layer in chosen if layer not in directions.vectors]:
        problems.append(f"no directions at layers {absent}: there are {directions.layers}")
    elif normless := [layer for layer in chosen if layer not in directions.residual_norms]:
        problems.append(f"no residual norm for layers {normless}: extract the directions again")
    return chosen


def _wrong_tokens(lm: LanguageModel | PreTrainedModel, tokens: Tokens) -> list[str]:
    if isinstance(tokens, slice):
        ends = (tokens.start, tokens.stop)
        whole = all(e is None or (isinstance(e, Integral) and e >= 0) for e in ends)
        if whole and tokens.step in (None, 1):
            return []
        return [
            f"tokens={tokens}: count from the start of the text, in steps of one, as in "
            "slice(3, 10) (where a text ends is not known while it is written)"
        ]
    if tokens not in ("all", "generated", "sentence_end"):
        return [f"no tokens {tokens!r}: choose 'all', 'generated', 'sentence_end' or a slice"]
    if tokens == "sentence_end" and not isinstance(lm, LanguageModel):
        return ["tokens='sentence_end' needs the tokenizer: pass what amy.load_model gives"]
    model = lm.model if isinstance(lm, LanguageModel) else lm
    if tokens == "generated" and not hasattr(model, "generate"):
        return [f"{type(model).__name__} generates nothing: steer with tokens='all'"]
    return []


def _unfit(
    lm: LanguageModel | PreTrainedModel,
    n_layers: int,
    directions: Directions,
    allow_other_model: bool,
) -> list[str]:
    """Why directions are not this model's; warns if they are of other weights of its name."""
    model = lm.model if isinstance(lm, LanguageModel) else lm
    here = lm.name if isinstance(lm, LanguageModel) else type(model).__name__
    made_for = directions.provenance.get("model")
    hidden_size = model.config.get_text_config().hidden_size
    if directions.hidden_size != hidden_size:
        return [
            f"directions of {directions.hidden_size} do not fit a residual stream of "
            f"{hidden_size}, that of {here}: they were made for {made_for or 'another model'}"
        ]
    depth = directions.provenance.get("n_layers", n_layers)
    if depth != n_layers:
        return [
            f"directions of a model of {depth} layers do not fit the {n_layers} of {here}: they "
            f"were made for {made_for or 'another model'}"
        ]
    revision = directions.provenance.get("revision")
    # A bare model does not say what it is called; the same weights may go by several names.
    if not made_for or not isinstance(lm, LanguageModel) or revision == lm.revision:
        return []
    if _last_part(made_for) != _last_part(here) and not allow_other_model:
        return [
            f"the directions were made for {made_for}, this model is {here}: extract directions "
            f"from it, or pass allow_other_model=True if it was trained from {made_for}"
        ]
    if _last_part(made_for) == _last_part(here) and revision:
        warnings.warn(
            f"the directions are of {made_for} at revision {revision}, the model is at "
            f"{lm.revision}: other weights, or the same in another dtype; extract them again if "
            "they should be its own",
            stacklevel=4,  # the caller's `with`
        )
    return []


def _last_part(name: str) -> str:
    """A hub id and a folder of the same model agree in it."""
    return name.rsplit("/", 1)[-1].casefold()
