"""Continuations: what a model writes, steered or not, and what was read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd

from ..directions import Directions
from ..models import LanguageModel
from ..readout import Reading, Readout
from ..readout.generation import check_length
from ..readout.sampling import sampled
from ..steering import steer


class Replaced(Exception):
    """A later request has taken the place of this one."""


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prompt with what was written after it: z-scores, tokens (the index) by concepts.

    The tokens from `written_from` on were written by the model.
    """

    zscores: pd.DataFrame
    written_from: int

    @property
    def tokens(self) -> list[str]:
        return list(self.zscores.index)


@dataclass(frozen=True)
class Request:
    """All that a continuation depends on, but for the model."""

    prompt: str
    strengths: Mapping[str, float]
    layers: tuple[int, ...]
    seed: int
    tokens: int
    temperature: float
    read_layer: int
    allow_other_model: bool


def write(
    lm: LanguageModel,
    directions: Directions | None,
    readout: Readout,
    request: Request,
    *,
    replaced: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Callable[[], Continuation]], None] | None = None,
) -> Continuation:
    """Continue a prompt, steered as requested if there are `directions`, and read it meanwhile.

    The same seed draws with the same noise, steered or not. `on_progress` is called at every token
    that is written, with a function that gives what there is so far. Raises Replaced soon after
    `replaced()` becomes true; ModelError for a prompt of no tokens or too many.
    """
    inputs = lm.tokenizer(request.prompt, return_tensors="pt")
    n_prompt = inputs["input_ids"].shape[1]
    check_length(lm, n_prompt, request.tokens)
    readings: list[Reading] = []

    def so_far() -> Continuation:
        rows = [reading.zscores[0].tolist() for reading in readings]
        index = pd.Index([reading.token for reading in readings], name="token")
        return Continuation(pd.DataFrame(rows, index, readout.directions.concepts), n_prompt)

    def read(reading: Reading) -> None:
        if replaced():
            raise Replaced
        readings.append(reading)
        if on_progress and reading.generated:
            on_progress(so_far)

    other = {"allow_other_model": request.allow_other_model}
    steering = (
        nullcontext()
        if directions is None
        else steer(lm, directions, request.strengths, layers=request.layers, **other)
    )
    attached = readout.attach(lm, layers=[request.read_layer], prompt=True, on_token=read, **other)
    with steering, attached:
        lm.model.generate(
            input_ids=inputs["input_ids"].to(lm.device),
            attention_mask=inputs["attention_mask"].to(lm.device),
            max_new_tokens=request.tokens,
            pad_token_id=lm.tokenizer.pad_token_id,
            **sampled(request.seed, request.temperature),
        )
    return so_far()
