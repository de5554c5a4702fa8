"""Job run: a training job under way, and the account of it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..training import Apollo
from ..training.loop import Loop
from ..training.trainer import chosen_parameters
from .jobs import TrainingJob
from .results import JobResult

_WATCHED = 64  # examples whose log-probability is taken before and after
_SHOWN = 12  # parameters in a result
_PIECE = 1 << 24  # elements compared at once

_SETTINGS = (
    *("lr", "betas", "eps", "weight_decay", "scale", "proj_refresh"),
    *("norm_growth_limit", "stochastic_rounding"),
)
DEFAULTS = {name: inspect.signature(Apollo).parameters[name].default for name in _SETTINGS}
"""What Apollo does unless a job says otherwise; its rank is the optimizer's own."""


class JobRun:
    """A job under way: what it trains, and what is to be told of it."""

    def __init__(self, name: str, job: TrainingJob, model: PreTrainedModel):
        self.name, self.job, self.model = name, job, model
        self.objective = job.made_objective()
        self.trained = chosen_parameters(model, job.parameters)
        self.batches = job.batches()
        self.watched = job.examples()[:_WATCHED]
        self.examples = [*job.examples(), *job.replay()]
        self.before: dict[str, Tensor] | None = None
        self.expected: dict[str, tuple[float, float, float]] = {}
        self.records: list[dict[str, Any]] = []
        self.scores: dict[str, list[float | None]] = {}
        self.changes: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.undo, self.optimizer = False, ""
        self.started = _now()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def loop(self, optimizer: Apollo) -> Loop:
        job, settings = self.job, dict(optimizer.param_groups[0])
        settings = {n: settings[n] for n in (*DEFAULTS, "rank")}
        return Loop(
            model=self.model,
            objective=self.objective,
            trained=self.trained,
            make=lambda pairs: Apollo(pairs, **settings),
            n_steps=len(self.batches),
            at_once=math.ceil(job.batch_size / job.accumulate),
            schedule=job.schedule,
            warmup_steps=job.warmup_steps,
            clip=job.clip,
            step_in_backward=job.step_in_backward,
            dry_run=job.dry_run,
            optimizer=optimizer,
        )

    def score(self, loop: Loop, when: str) -> None:
        pairs = loop.log_probabilities(self.watched, "", progress=False)
        self.scores[f"continuation {when}"] = [chosen for chosen, _ in pairs]
        if any(rejected is not None for _, rejected in pairs):
            self.scores[f"rejected {when}"] = [rejected for _, rejected in pairs]

    def compare(self) -> None:
        """What has changed of every parameter, where there is something to compare with."""
        if self.before is None:
            return
        with self.timed("compare"):
            self.changes = [
                {"name": name, **_change(parameter, self.before[name])}
                for name, parameter in self.trained.items()
            ]

    def result(self) -> JobResult:
        changes, n_changed = self.changes, None
        if self.expected:
            changes = [self._would_change(name) for name in self.expected]
        if changes:
            n_changed = sum(change["changed"] > 0 for change in changes)
        furthest = sorted(changes, key=lambda change: -(change["relative_change"] or 0))
        return JobResult(
            job=self.name,
            state="done",
            label=self.job.label,
            objective=self.job.objective,
            dry_run=self.job.dry_run,
            steps=self.records,
            log_probabilities=self.scores,
            changes=furthest[:_SHOWN],
            parameters_changed=n_changed,
            undo=self.undo or self.job.dry_run,
            optimizer=self.optimizer,
            seconds={what: round(value, 4) for what, value in self.seconds.items()},
            started=self.started,
            finished=_now(),
        )

    def _would_change(self, name: str) -> dict[str, Any]:
        change, changed, _ = self.expected[name]
        norm = torch.linalg.vector_norm(self.trained[name].detach(), dtype=torch.float32).item()
        return _described(name, norm, change, changed)


def _described(name: str, norm: float, change: float, changed: float) -> dict[str, Any]:
    relative = change / norm if norm > 0 else None
    return {
        "name": name,
        "norm": norm,
        "change": change,
        "relative_change": relative,
        "changed": changed,
    }


@torch.no_grad()
def _change(parameter: Tensor, before: Tensor) -> dict[str, Any]:
    """Norm before, norm of the change, and the share of entries that differ, piece by piece."""
    norm = change = changed = 0.0
    pieces = zip(parameter.reshape(-1).split(_PIECE), before.reshape(-1).split(_PIECE), strict=True)
    for now, then in pieces:
        then = then.to(now.device)
        norm += torch.linalg.vector_norm(then, dtype=torch.float32).item() ** 2
        change += torch.linalg.vector_norm(now.float() - then.float()).item() ** 2
        changed += (now != then).sum().item()
    found = _described("", math.sqrt(norm), math.sqrt(change), changed / max(1, before.numel()))
    return {key: value for key, value in found.items() if key != "name"}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
