"""What a training run did: every step, what it made likelier, and which parameters moved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from .loop import Loop
from .objectives import Objective
from .saved_run import SavedRun

if TYPE_CHECKING:
    from ..directions import Directions

_LAYER = re.compile(r"\.(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run did. Nothing but `weights_after` and the frames differs in a dry run.

    steps: a row per step: loss, grad_norm (before clipping), lr, tokens, seconds, what the
        objective reports, and `skipped`, the reason why a step changed nothing.
    log_probabilities: a row per watched example: the mean log-probability per token of its
        continuation (and of its rejected one) before and after.
    changes: a row per trained parameter, by name: its layer and part, `norm` before, `gradient`
        (root mean square over the steps of its gradient's norm), `change` (norm of after less
        before), both again relative to `norm`, and `changed`, the share of its entries that differ.
        In a dry run `change` is what the first step would do, and `loss_change` its gradient times
        that: what the loss of that batch would change by, to first order.
    readings: z-scores of a readout, averaged over the texts, before and after; None without one.
    """

    objective: Objective
    steps: pd.DataFrame
    log_probabilities: pd.DataFrame
    changes: pd.DataFrame
    readings: pd.DataFrame | None
    weights_before: str
    weights_after: str
    dry_run: bool
    folder: Path | None

    @property
    def skipped(self) -> pd.DataFrame:
        """The steps that changed nothing, and why."""
        return self.steps[self.steps["skipped"].notna()]

    @property
    def optimizer_state(self) -> Path | None:
        """The file of the optimizer's memory, to go on from in another run."""
        return None if self.folder is None else SavedRun(self.folder).optimizer_state

    def summary(self) -> str:
        """A few lines for people."""
        done = self.steps[self.steps["skipped"].isna()]
        name = type(self.objective).__name__
        lines = [f"{len(self.steps)} steps of {name}, {len(self.skipped)} of them skipped"]
        if len(done):
            first, last = done["loss"].iloc[0], done["loss"].iloc[-1]
            lines.append(f"loss {first:.4f} at the first step, {last:.4f} at the last")
        for which in ("continuation", "rejected"):
            if f"{which} before" in self.log_probabilities:
                means = [
                    f"{self.log_probabilities[column].mean():.4f} {when}"
                    for when in ("before", "after")
                    if (column := f"{which} {when}") in self.log_probabilities
                ]
                lines.append(f"log-probability per {which} token: {', '.join(means)}")
        if self.dry_run:
            expected = self.changes["loss_change"].sum()
            lines.append(f"the first step would change the loss of its batch by {expected:+.2g}")
            lines.append(f"dry run: weights are {self.weights_after}, as they were")
        else:
            lines.append(f"weights were {self.weights_before}, are {self.weights_after}")
        return "\n".join(lines)


def step_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row per step, as `TrainingResult.steps` says."""
    frame = pd.DataFrame(records).set_index("step")
    numbers = frame.drop(columns="skipped").astype(float)
    return numbers.assign(skipped=frame["skipped"])


def log_probability_frame(start: Mapping[str, Any], end: Mapping[str, Any]) -> pd.DataFrame:
    """A row per watched example; without a column for what was not measured."""
    columns = {}
    for place, which in enumerate(("continuation", "rejected")):
        for when, measured in (("before", start), ("after", end)):
            values = [pair[place] for pair in measured.get("log_probabilities", [])]
            if any(value is not None for value in values):
                columns[f"{which} {when}"] = values
    return pd.DataFrame(columns, dtype=float).rename_axis("example")


def reading_frame(
    directions: Directions, start: Mapping[str, Any], end: Mapping[str, Any]
) -> pd.DataFrame:
    """A row per layer and concept; without a column for what was not measured."""
    rows = pd.MultiIndex.from_product(
        [directions.layers, directions.concepts], names=["layer", "concept"]
    )
    values = {
        when: sum(measured["readings"], [])
        for when, measured in (("before", start), ("after", end))
        if "readings" in measured
    }
    return pd.DataFrame(values, index=rows)


def change_frame(
    loop: Loop,
    norms: Mapping[str, float],
    records: Sequence[Mapping[str, Any]],
    before: Mapping[str, Tensor] | None,
) -> pd.DataFrame:
    """A row per trained parameter, as `TrainingResult.changes` says."""
    counted = max(1, sum(record["skipped"] is None for record in records))
    rows = []
    for name, parameter in loop.trained.items():
        change = changed = loss_change = math.nan
        if loop.dry_run:
            change, changed, loss_change = loop.expected.get(name, (0.0, 0.0, 0.0))
        elif before is not None:
            now = parameter.detach().cpu()
            change = norm_of(now.float() - before[name].float())
            changed = (now != before[name]).float().mean().item()
        layer = _LAYER.search(name)
        rows.append(
            {
                "name": name,
                "layer": int(layer[1]) if layer else None,
                "part": layer[2] if layer else name.removesuffix(".weight"),
                "shape": tuple(parameter.shape),
                "norm": norms[name],
                "gradient": math.sqrt(loop.gradients.get(name, 0.0) / counted),
                "change": change,
                "changed": changed,
                **({"loss_change": loss_change} if loop.dry_run else {}),
            }
        )
    frame = pd.DataFrame(rows).set_index("name").astype({"layer": "Int64"})
    norm = frame["norm"].where(frame["norm"] > 0)
    for column in ("gradient", "change"):
        frame[f"relative_{column}"] = frame[column] / norm
    return frame


def norm_of(tensor: Tensor) -> float:
    """L2 norm, summed in float32."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).item()
