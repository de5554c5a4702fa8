"""Recordings: the forwards of one generation or text, and the sequences they come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ModelError


@dataclass
class Step:
    """One forward: those of the `ids` it read that are recorded, and what their states project to.

    They are its last ones, in the places before `end`. A place is a column of the batch: padding
    counts, and so does what a cache held before. `values[layer]` is on the layer's device.
    """

    end: int
    ids: Int[Tensor, "rows recorded"]
    values: dict[int, Float[Tensor, "rows recorded concepts"]] = field(default_factory=dict)

    @property
    def places(self) -> range:
        return range(self.end - self.ids.shape[1], self.end)


@dataclass
class Result:
    """What `generate` returned: `ids` from place `first` on, `lengths[s]` of them generated.

    `beam_rows[s, t]` is the row whose forward the t-th generated token of sequence s was chosen in;
    None where sequences stay in their rows.
    """

    ids: Int[Tensor, "sequences tokens"]
    first: int
    lengths: list[int]
    beam_rows: Int[Tensor, "sequences generated"] | None


class Sequence(NamedTuple):
    """The recorded tokens of one sequence, in reading order.

    `values` is (tokens, layers, concepts), float32 on the CPU; NaN for the last token of a
    generation, which the model chose and did not read.
    """

    ids: list[int]
    positions: list[int]
    generated: list[bool]
    values: Float[Tensor, "tokens layers concepts"]


@dataclass(eq=False)
class Recording:
    """What was read in one `generate`, or by forwards that continue one another.

    `prompt_end` is the place of the first generated token; None outside `generate`.
    """

    layers: list[int]
    n_concepts: int
    prompt_end: int | None = None
    beams: bool = False
    mask: Int[Tensor, "rows places"] | None = None
    """0 for padding: the latest that a forward was given, which covers all places so far."""
    end: int = 0
    """The place after the last token read, recorded or not."""
    steps: list[Step] = field(default_factory=list)
    result: Result | None = None

    @property
    def n_sequences(self) -> int:
        if self.result is not None:
            return len(self.result.ids)
        # Of beams that were interrupted nobody can tell which would have been kept.
        return 0 if self.beams or not self.steps else len(self.steps[0].ids)

    def positions(self, n: int, width: int) -> Int[Tensor, "n width"]:
        """The position of each place in its sequence, padding not counted; -1 for padding."""
        real = torch.ones(n, width, dtype=torch.bool)
        if self.mask is not None:
            own = torch.arange(n) * len(self.mask) // n
            known = self.mask.cpu().bool()[own, :width]
            real[:, : known.shape[1]] = known
        return (real.cumsum(1) - 1).masked_fill(~real, -1)

    def sequences(self) -> list[Sequence]:
        """All sequences, each value with the token that stands in its place.

        A generation that was interrupted comes to what was read of it. Raises ModelError if
        `generate` returned tokens the model was not seen reading: then it works in a way that this
        does not follow.
        """
        if not self.n_sequences:
            return []
        # A place is read twice where a candidate was taken back: the last reading counts.
        places = [place for step in self.steps for place in step.places]
        columns = {place: column for column, place in enumerate(places)}
        width = max(columns, default=-1) + 1
        if self.result is not None:
            width = self.result.first + self.result.ids.shape[1]
        at = torch.tensor([columns.get(place, -1) for place in range(width)])
        rows = self._rows(width)
        read = (rows >= 0) & (at >= 0)
        where = rows.clamp(min=0), at.clamp(min=0).expand_as(rows)
        ids = torch.full(rows.shape, -1)
        values = torch.full((*rows.shape, len(self.layers), self.n_concepts), torch.nan)
        if columns:
            ids = torch.cat([step.ids for step in self.steps], dim=1).cpu()[where]
            for i, layer in enumerate(self.layers):
                found = [step.values[layer] for step in self.steps if layer in step.values]
                values[:, :, i] = torch.cat(found, dim=1).cpu()[where]
        generated = torch.zeros_like(read)
        if self.result is not None:
            ids, read, generated = self._as_returned(ids, read)
        elif self.prompt_end is not None:
            generated[:, self.prompt_end :] = True
        values[~read] = torch.nan
        positions = self.positions(*rows.shape)
        listed = (read & (positions >= 0)) | (generated if self.result is not None else False)
        return [
            Sequence(
                ids[s, keep].tolist(),
                positions[s, keep].tolist(),
                generated[s, keep].tolist(),
                values[s, keep],
            )
            for s, keep in enumerate(listed)
        ]

    def _rows(self, width: int) -> Int[Tensor, "sequences places"]:
        """The row that held each sequence when each place was read; -1 where none did."""
        n, n_rows = self.n_sequences, len(self.steps[0].ids) if self.steps else 1
        # A prompt is in as many rows as there are beams of it: its first will do.
        rows = (torch.arange(n) * n_rows // n)[:, None].repeat(1, width)
        if self.result is not None and self.result.beam_rows is not None:
            # The row the next token was chosen in: that one had just read this token.
            chosen = self.result.beam_rows.cpu().long()[:, 1:]
            rows[:, self.prompt_end :] = -1
            rows[:, self.prompt_end : self.prompt_end + chosen.shape[1]] = chosen
        return rows

    def _as_returned(
        self, ids: Int[Tensor, "sequences places"], read: Bool[Tensor, "sequences places"]
    ) -> tuple[
        Int[Tensor, "sequences places"],
        Bool[Tensor, "sequences places"],
        Bool[Tensor, "sequences places"],
    ]:
        """Ids as `generate` returned them, where they were read, and which were generated."""
        returned = torch.full_like(ids, -1)
        returned[:, self.result.first :] = self.result.ids.cpu()
        places = torch.arange(ids.shape[1])
        ends = self.prompt_end + torch.tensor(self.result.lengths)[:, None]
        generated = (places >= self.prompt_end) & (places < ends)
        # The very last one may be read while others of the batch go on; it never counts.
        read = read & (ids == returned) & (places < ends - 1)
        unread = generated & (places < ends - 1) & ~read
        if unread.any():
            raise ModelError(
                f"{int(unread.sum())} of the tokens that generate returned were not seen being "
                "read: greedy search, sampling, beams and speculation can be followed, this way "
                "of generating cannot"
            )
        return returned, read, generated
