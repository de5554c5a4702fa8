"""Job results: what a training job did to the weights of a server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FINISHED = ("done", "failed")


@dataclass(frozen=True)
class JobResult:
    """What a job did; of one that failed, what was tried before the weights were put back.

    state: "done" or "failed"; then `error` says why, and `kind` is one of `jobs.KINDS`.
    steps: a record per step: loss, grad_norm, lr, tokens, seconds, what the objective reports.
    log_probabilities: mean per token of the first examples, "continuation before", "continuation
        after", and so for "rejected".
    changes: the parameters that moved furthest relative to their norm: name, norm, change,
        relative_change, and `changed`, the share of entries that differ. parameters_changed: how
        many did. In a dry run, what the first step would do. Without a copy to compare with
        (`undo` False) there are none.
    undo: whether the weights before the job were kept until its end, so that a failure changed
        nothing.
    optimizer: whether it went on from the job before, or why it began anew.
    seconds: of each part. started, finished: UTC.
    """

    job: str
    state: str
    label: str = ""
    objective: str = "sft"
    dry_run: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)
    log_probabilities: dict[str, list[float | None]] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    parameters_changed: int | None = None
    undo: bool = True
    optimizer: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    error: str | None = None
    kind: str | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> JobResult:
        """Fields of later versions are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        """Without NaN and infinities, which JSON has not: null in their place."""
        return _finite(asdict(self))

    @property
    def losses(self) -> list[float | None]:
        return [step.get("loss") for step in self.steps]

    def brief(self) -> dict[str, Any]:
        """A line's worth of it, for the history of a checkpoint."""
        losses = self.losses
        return _finite(
            {
                "job": self.job,
                "label": self.label,
                "objective": self.objective,
                "steps": len(self.steps),
                "loss": [losses[0], losses[-1]] if losses else None,
                "finished": self.finished,
            }
        )

    def frame(self) -> pd.DataFrame:
        """A row per step, by its number."""
        import pandas as pd

        return pd.DataFrame(self.steps).set_index("step") if self.steps else pd.DataFrame()

    def __str__(self) -> str:
        if self.state != "done":
            return f"{self.job} failed ({self.kind}): {self.error}"
        losses = self.losses
        told = [f"{self.job}{' (dry run)' if self.dry_run else ''}: {len(losses)} steps"]
        if losses:
            told.append(f"loss {losses[0]:.4f} at the first, {losses[-1]:.4f} at the last")
        before, after = (
            [v for v in self.log_probabilities.get(f"continuation {when}", []) if v is not None]
            for when in ("before", "after")
        )
        if before and after:
            told.append(
                f"log-probability per token {sum(before) / len(before):.3f} before, "
                f"{sum(after) / len(after):.3f} after"
            )
        if self.parameters_changed is not None:
            told.append(f"{self.parameters_changed} parameters changed")
        return ", ".join([*told, f"optimizer: {self.optimizer}"])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
