"""Streaming: each token with its readout, as soon as the model has read it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .recording import Recording, Step
from .spelling import Spelling


class Reading(NamedTuple):
    """A token and what it was read as, at (layers, concepts), in float32 on the CPU.

    `sequence`, `position`, `generated`, `values` and `zscores` are as in `LiveReadout.frame`; the
    last token of a generation has NaN.
    """

    sequence: int
    position: int
    token: str
    generated: bool
    values: Float[Tensor, "layers concepts"]
    zscores: Float[Tensor, "layers concepts"]


class Stream:
    """Hands the tokens of one recording to `on_token`, those of a row in reading order.

    `ends` are the tokens that end a row of a generation: what follows them is padding.
    """

    def __init__(
        self,
        on_token: Callable[[Reading], None],
        recording: Recording,
        *,
        first: int,
        tokenizer: PreTrainedTokenizerBase,
        zscored: Callable[[Tensor], Tensor],
        ends: Collection[int],
    ):
        self._on_token = on_token
        self._recording = recording
        self._first = first
        self._tokenizer = tokenizer
        self._zscored = zscored
        self._ends = ends
        self._spellings: dict[int, Spelling] = {}
        self._ended: set[int] = set()

    def read(self, step: Step) -> None:
        """Hand on the tokens of a forward, but for those that follow the end of their row."""
        if not step.values:
            return
        found = [step.values[layer].cpu() for layer in self._recording.layers]
        values = torch.stack(found, dim=2)
        for row, ids in enumerate(step.ids.tolist()):
            for column, (place, token_id) in enumerate(zip(step.places, ids, strict=True)):
                if self._generated(place) and token_id in self._ends:
                    self._ended.add(row)  # `finish` hands it on
                if row not in self._ended:
                    self._hand_on(row, place, token_id, values[row, column], last=False)

    def finish(self) -> None:
        """Hand on the last tokens, which the model has chosen and not read."""
        recording, result = self._recording, self._recording.result
        nothing = torch.full((len(recording.layers), recording.n_concepts), torch.nan)
        for row, length in enumerate(result.lengths):
            if length:
                place = recording.prompt_end + length - 1
                token_id = int(result.ids[row, place - result.first])
                self._hand_on(row, place, token_id, nothing, last=True)

    def _generated(self, place: int) -> bool:
        prompt_end = self._recording.prompt_end
        return prompt_end is not None and place >= prompt_end

    def _hand_on(self, row: int, place: int, token_id: int, values: Tensor, *, last: bool) -> None:
        recording = self._recording
        position = int(recording.positions(recording.n_sequences, place + 1)[row, place])
        if position < 0:
            return
        spelling = self._spellings.setdefault(row, Spelling(self._tokenizer))
        self._on_token(
            Reading(
                self._first + row,
                position,
                spelling.add(token_id, last=last),
                self._generated(place),
                values,
                self._zscored(values[None])[0],
            )
        )
