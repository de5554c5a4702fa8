"""Sweep: what pushes of each layer and strength did, which to take, and the files it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..artefacts import (
    as_json,
    provenance,
    read_json,
    read_tensors,
    replacing,
    write_tensors,
)
from ..errors import ArtefactError, SteeringError

CHOICE, HELD_OUT = "choice", "held_out"
"""The split on which layer and strength are chosen, and the one that is reported."""
WHERE = ["concept", "layer", "strength"]
TABLES = {
    "cells": [
        *WHERE,
        *("split", "n_texts", "target", "target_low", "target_high", "base"),
        *("random_target", "random_low", "random_high", "perplexity_ratio", "random_perplexity"),
        *("distinct_sentences", "base_sentences", "distinct_bigrams", "base_bigrams"),
    ],
    "doses": ["concept", "layer", "split", "rho", "rho_low", "rho_high"],
    "written": [*WHERE, "split", "prompt", "text", "perplexity"],
}
"""The frames of a sweep, and the columns that each must have."""
_TEXT = {"concept", "split", "prompt", "text"}
_SAFE = 0.9
"""What is chosen on few prompts is a little worse on others: it is chosen within 0.9 the limit."""
_MADE_BY = "`amy.steering_sweep(...).save(folder)` (notebook 08)"


@dataclass(frozen=True, eq=False)
class SteeringSweep:
    """What was written under pushes toward each concept, by layer, strength and split of prompts.

    `cells` has a row for each, of these columns:

    - `target`: share of texts that show the concept (`target_low`, `target_high`: Wilson's 95%
      interval); `base` is the same share without steering; `random_target` that under random pushes
      of the same length at the same layer, mean over draws, `random_low` and `random_high` the
      least and greatest draw.
    - `perplexity_ratio`: perplexity of the steered over that of the unsteered texts, both under the
      unsteered model; `random_perplexity` is that ratio under random pushes.
    - `distinct_sentences`, `distinct_bigrams`: the share of sentences, and within each text of
      pairs of tokens, that are not repeats, for repetition lowers perplexity; `base_*` without
      steering.

    `doses` says how steadily the concept's reading follows the strength: `rho` is Spearman's, of
    each prompt over all strengths and none, mean over prompts, with a 95% bootstrap interval over
    prompts. `written` holds every text, under "" without steering and under "random 0" and so on.
    `shifts` and `random_shifts` have a row per row of `cells` and a column per concept of the
    directions: how far the mean reading moved, in z-scores, and the root mean square over random
    pushes of how far it did there.
    """

    cells: pd.DataFrame
    doses: pd.DataFrame
    written: pd.DataFrame
    shifts: pd.DataFrame
    random_shifts: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def concepts(self) -> list[str]:
        """What was pushed toward, in order; several at once are one, as in "calm + curious"."""
        return list(dict.fromkeys(self.cells["concept"]))

    def frame(self) -> pd.DataFrame:
        """`cells` with the `rho` of their concept, layer and split."""
        return self.cells.merge(self.doses, on=["concept", "layer", "split"], how="left")

    def best(self, *, goal: float = 0.6, limit: float = 2.0) -> pd.DataFrame:
        """The layer and strength to take for each concept, as it does on the held-out prompts.

        Chosen on the other prompts: the largest target among the fluent cells, the smallest
        strength among equals. Fluent is what neither multiplies perplexity by `limit` nor divides
        the share of distinct sentences or bigrams by it. If no cell is, the one of least perplexity
        stands. A row per concept: `frame()`'s columns on the held-out prompts, `chosen_target` on
        those it was chosen on, `fluent`, `steers` (fluent, a target of `goal` or more, and more
        than any random push) and a `verdict` in words.
        """
        frame, rows = self.frame(), []
        for concept in self.concepts:
            tried = frame[(frame["concept"] == concept) & (frame["split"] == CHOICE)]
            fluent = tried[_fluent(tried, _SAFE * limit)]
            if len(fluent):
                weakest_first = fluent.sort_values("strength", key=abs, kind="stable")
                chosen = weakest_first.sort_values("target", ascending=False, kind="stable")
            else:
                chosen = tried.sort_values("perplexity_ratio", kind="stable")
            chosen = chosen.iloc[0]
            same = (frame[WHERE] == chosen[WHERE].tolist()).all(axis=1)
            row = frame[same & (frame["split"] == HELD_OUT)].drop(columns="split").iloc[0].to_dict()
            row["chosen_target"] = chosen["target"]
            row["fluent"] = bool(_fluent(row, limit))
            # No random pushes, nothing to beat.
            by_chance = row["target"] <= row["random_high"]
            row["steers"] = row["fluent"] and row["target"] >= goal and not by_chance
            row["verdict"] = _verdict(row, goal, limit)
            rows.append(row)
        return pd.DataFrame(rows).set_index("concept")

    def side_effects(
        self, concept: str, layer: int | None = None, strength: float | None = None
    ) -> pd.DataFrame:
        """How far a push toward `concept` moved the readings of all concepts, the farthest first.

        Indexed by concept: `shift` in z-scores on the held-out prompts, `random` its typical size
        under random pushes of that length, `target` whether it is (a part of) what was pushed
        toward. Layer and strength default to those of `best()`. Raises SteeringError for a concept,
        layer or strength that was not swept.
        """
        cells = self.cells[(self.cells["split"] == HELD_OUT) & (self.cells["concept"] == concept)]
        if cells.empty:
            raise SteeringError(f"{concept!r} was not swept: choose of {', '.join(self.concepts)}")
        if layer is None or strength is None:
            best = self.best().loc[concept]
            layer = best["layer"] if layer is None else layer
            strength = best["strength"] if strength is None else strength
        row = cells[(cells["layer"] == layer) & np.isclose(cells["strength"], strength)]
        if row.empty:
            tried = zip(cells["layer"], cells["strength"], strict=True)
            raise SteeringError(
                f"{concept} was not swept at layer {layer}, strength {strength}: choose of "
                f"{', '.join(f'{layer} at {strength:g}' for layer, strength in tried)}"
            )
        parts = self.provenance.get("pushes", {}).get(concept, {concept: 1.0})
        frame = pd.DataFrame(
            {"shift": self.shifts.loc[row.index[0]], "random": self.random_shifts.loc[row.index[0]]}
        )
        frame["target"] = frame.index.isin(list(parts))
        return frame.sort_values("shift", key=lambda shift: -shift.abs(), kind="stable")

    def save(self, folder: Path | str, **facts: Any) -> Path:
        """Write `steering.json` and `steering.safetensors` into `folder`; returns the folder.

        `facts` join the provenance. Raises ArtefactError for a fact that JSON cannot hold.
        """
        folder = Path(folder)
        written_by = ("format_version", "versions")
        origin = {k: v for k, v in self.provenance.items() if k not in written_by}
        tables = {name: _as_lists(getattr(self, name)) for name in TABLES}
        read = {"readings": list(self.shifts.columns)}
        description = as_json({**provenance(**origin), **facts, **read, **tables})
        with replacing(folder / "steering.json") as temporary:
            temporary.write_text(description, encoding="utf-8")
            shifts = {
                name: torch.tensor(getattr(self, name).to_numpy(np.float32))
                for name in ("shifts", "random_shifts")
            }
            write_tensors(folder / "steering.safetensors", shifts)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> SteeringSweep:
        """Read what `save` wrote. Raises ArtefactError if it is missing, damaged or not whole."""
        folder = Path(folder)
        content = read_json(folder / "steering.json", _MADE_BY)
        tensors, _ = read_tensors(folder / "steering.safetensors", _MADE_BY)
        parts = [*TABLES, "readings"]
        if lacking := [name for name in parts if name not in content]:
            raise ArtefactError(
                f"{folder / 'steering.json'} lacks {', '.join(lacking)}: write it again with "
                f"{_MADE_BY}"
            )
        try:
            tables = {name: _as_frame(content[name], names) for name, names in TABLES.items()}
            shifts = {
                name: pd.DataFrame(
                    tensors[name].numpy(), tables["cells"].index, content["readings"]
                )
                for name in ("shifts", "random_shifts")
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{folder} is damaged or its two files are not from one run ({error}): write it "
                f"again with {_MADE_BY}"
            ) from error
        return cls(
            **tables,
            **shifts,
            provenance={k: v for k, v in content.items() if k not in parts},
        )


def _fluent(cells: pd.DataFrame | Mapping[str, float], limit: float) -> pd.Series | bool:
    fluent = cells["perplexity_ratio"] <= limit
    for kind in ("sentences", "bigrams"):
        fluent &= cells[f"distinct_{kind}"] >= cells[f"base_{kind}"] / limit
    return fluent


def _verdict(row: Mapping[str, Any], goal: float, limit: float) -> str:
    place = f"at layer {row['layer']}, strength {row['strength']:g}"
    found = f"a target of {row['target']:.2f} {place}, perplexity x{row['perplexity_ratio']:.2f}"
    if row["steers"]:
        return f"steers: {found}; random pushes reach {row['random_target']:.2f}"
    if not row["fluent"]:
        return f"writes no fluent text: {found}"
    if row["target"] >= goal:
        return f"does no better than a random push ({row['random_high']:.2f}): {found}"
    if row["chosen_target"] >= goal:
        return (
            f"reaches {goal:g} on the prompts it was chosen on ({row['chosen_target']:.2f}), not "
            f"on others: {found}"
        )
    return f"never reaches {goal:g} before fluency is lost (a factor of {limit:g}): {found}"


def _as_lists(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Numbers with six digits; None for what JSON has no number for."""
    return {
        name: [
            value
            if not isinstance(value, float)
            else float(f"{value:.6g}")
            if np.isfinite(value)
            else None
            for value in frame[name].tolist()
        ]
        for name in frame
    }


def _as_frame(columns: dict[str, list[Any]], names: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    if absent := [name for name in names if name not in frame]:
        raise ValueError(f"columns {', '.join(absent)} are missing")
    return frame.assign(**{n: pd.to_numeric(frame[n]) for n in frame if n not in _TEXT})
