"""Positions: which tokens of the forward that is running are steered."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SteeringError
from .interventions import Intervention

Tokens = Literal["all", "generated", "sentence_end"] | slice

_SENTENCE_END = re.compile(r"""[.!?…。！？]["'”’»)\]]*\s*$""")


class Positions:
    """The positions that `tokens` names, in whichever forward of the model is running.

    "generated" is what a `generate` call has written so far: prompts that come in chunks, caches
    that were filled before and assisted decoding included. A slice counts the tokens of each text
    from 0, padding left out, prompt and continuation alike. "sentence_end" is every token of
    `ends`, a mask over the vocabulary.
    """

    def __init__(self, tokens: Tokens, ends: Bool[Tensor, " vocabulary"] | None = None) -> None:
        self.tokens = tokens
        self.ends = ends
        self.prompt_length: int | None = None
        """While `generate` runs: how many positions were given to it, padding included."""
        self.chosen: Bool[Tensor, "batch tokens"] | None = None
        """While the model runs: where it is steered. The batch is 1 if all its texts agree."""

    def limit(self, change: Intervention) -> Intervention:
        """The same change at these positions alone; all other bits stay."""

        def limited(hidden: Tensor) -> Tensor:
            if self.chosen is None:
                raise SteeringError(
                    f"which tokens are {self.tokens} cannot be told when a part of the model is "
                    "called: call the model itself, or steer with tokens='all'"
                )
            return torch.where(self.chosen.to(hidden.device)[..., None], change(hidden), hidden)

        return limited

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block, every forward of `model` says first which tokens it is about."""
        names = list(inspect.signature(model.forward).parameters)

        def look(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
            self.chosen = self._choose(dict(zip(names, inputs, strict=False)) | keywords)

        def forget(*_: Any) -> None:
            self.chosen = None

        before = model.register_forward_pre_hook(look, with_kwargs=True)
        after = model.register_forward_hook(forget, always_call=True)
        try:
            with _telling_prompts(model, self) if self.tokens == "generated" else nullcontext():
                yield
        finally:
            before.remove()
            after.remove()

    def _choose(self, given: Mapping[str, Any]) -> Bool[Tensor, "batch tokens"] | None:
        """Where a forward with these arguments is steered; None if it reads no text."""
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if self.tokens == "sentence_end":
            if ids is None:
                raise SteeringError(
                    "tokens='sentence_end' needs to see the tokens, but the model was given "
                    "inputs_embeds: pass input_ids, or choose tokens by a slice"
                )
            ends = self.ends.to(ids.device)
            return ends[ids.clamp(max=len(ends) - 1)]
        text = embedded if ids is None else ids
        if text is None:
            return None
        n = text.shape[1]
        if self.tokens == "generated":
            start = _past_length(given)
            written_from = start + n if self.prompt_length is None else self.prompt_length
            return (torch.arange(start, start + n) >= written_from)[None]
        places = _places(given, n)
        stop = torch.iinfo(torch.long).max if self.tokens.stop is None else self.tokens.stop
        return (places >= (self.tokens.start or 0)) & (places < stop)


@functools.lru_cache(maxsize=4)
def sentence_ends(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Bool[Tensor, " vocabulary"]:
    """Which tokens end in `.`, `!`, `?` or `…`, maybe with closing quotes or brackets after it.

    By the token's own text alone: of "3.5" the point is one too.
    """
    spelt = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
    ends = torch.zeros(vocabulary, dtype=torch.bool)
    ends[: len(spelt)] = torch.tensor([bool(_SENTENCE_END.search(text)) for text in spelt])
    return ends


def _past_length(given: Mapping[str, Any]) -> int:
    """How many positions the model has read before this forward, padding included."""
    cache = given.get("past_key_values")
    if cache is None and given.get("cache_params") is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:
        raise SteeringError(
            "the cache of this model, which has no attention, does not tell how much was read "
            "before: steer with tokens='all' or 'sentence_end'"
        ) from error


def _places(given: Mapping[str, Any], n: int) -> Int[Tensor, "batch tokens"]:
    """The place of each of the `n` newest tokens in its own text; -1 is padding before it."""
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1)[:, -n:]
    # `generate` leaves an all-ones mask out, and prepares one of four dimensions for static caches.
    ids = given.get("position_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return ids
    start = _past_length(given)
    return torch.arange(start, start + n)[None]


_watchers: WeakKeyDictionary[PreTrainedModel, list[Positions]] = WeakKeyDictionary()


@contextmanager
def _telling_prompts(model: PreTrainedModel, positions: Positions) -> Iterator[None]:
    """Within the block, `model.generate` leaves in `positions` how long its prompt is.

    Only `generate` knows: without a cache every forward brings the whole text, and with one a
    prompt may come in chunks. One wrapper serves all blocks, so that they may end in any order.
    """
    watchers = _watchers.setdefault(model, [])
    if not watchers:
        _wrap_generate(model, watchers)
    watchers.append(positions)
    try:
        yield
    finally:
        watchers.remove(positions)
        if not watchers:
            model.__dict__.pop("generate").unwrap()


def _wrap_generate(model: PreTrainedModel, watchers: list[Positions]) -> None:
    generate, own = model.generate, model.__dict__.get("generate")

    @functools.wraps(generate)
    def generate_telling(*inputs: Any, **keywords: Any) -> Any:
        told, length = list(watchers), _prompt_length(inputs, keywords)
        for watcher in told:
            watcher.prompt_length = length
        try:
            return generate(*inputs, **keywords)
        finally:
            for watcher in told:
                watcher.prompt_length = None

    generate_telling.unwrap = lambda: own and setattr(model, "generate", own)
    model.generate = generate_telling


def _prompt_length(inputs: tuple, keywords: Mapping[str, Any]) -> int:
    # With a cache that was filled before, the mask covers what is in it as well.
    for name in ("attention_mask", "inputs_embeds", "input_ids", "inputs"):
        if keywords.get(name) is not None:
            return keywords[name].shape[1]
    return inputs[0].shape[1] if inputs and inputs[0] is not None else 1
