"""The steps of a run: losses, gradients, updates, and what is counted on the way."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .frozen_context import example_losses, token_log_probabilities
from .objectives import Objective, SequenceLogProbs
from .saved_run import SavedRun

if TYPE_CHECKING:
    from .examples import Example

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(eq=False)
class Loop:
    """The steps: losses, gradients, updates, and what is counted on the way."""

    model: PreTrainedModel
    objective: Objective
    trained: dict[str, nn.Parameter]
    make: Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
    n_steps: int
    at_once: int
    schedule: str
    warmup_steps: int
    clip: float | None
    step_in_backward: bool
    dry_run: bool
    optimizer: Optimizer | None = None
    """One that goes on from an earlier run; `make` makes it otherwise."""
    reference: dict[Any, list[float]] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Squared norms, summed over the steps."""
    expected: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """In a dry run: norm of the first step's change, changed share, and change of the loss."""

    def __post_init__(self) -> None:
        self.optimizer = self.optimizer or self.make(list(self.trained.items()))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def go_on_from(self, path: Path) -> None:
        """Take over an earlier run's memory, but not its settings."""
        asked = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state(path)
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(settings)

    def run(
        self,
        batches: list[list[Example]],
        done: int,
        run: SavedRun | None,
        save_every: int,
        progress: bool,
    ) -> list[dict[str, Any]]:
        """All steps after the first `done`; the records of all, the earlier ones as logged."""
        records = [] if run is None else run.logged(before=done)
        bar = tqdm(
            total=len(batches),
            initial=done,
            desc="dry run" if self.dry_run else "training",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not progress,
        )
        with bar, _tensorboard(run, done) as board:
            for number in range(done, len(batches)):
                record = self.step(number, batches[number])
                records.append(record)
                bar.set_postfix_str(_shown(record), refresh=False)
                bar.update()
                if run is None:
                    continue
                run.log(record)
                board(record)
                if (number + 1) % save_every == 0 or number + 1 == len(batches):
                    run.save(number + 1, self.trained, self.optimizer, self.gradients)
        return records

    def step(self, number: int, batch: list[Example]) -> dict[str, Any]:
        """One step, or none if loss or gradient is not finite: its figures."""
        started = time.perf_counter()
        factor = self._factor(number)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        norms: dict[str, Tensor] = {}
        try:
            with self._seeing_gradients(number, norms):
                loss, figures = self._backward(batch)
            reason = None if math.isfinite(loss) else f"loss is {loss}"
            total = None
            if reason is None:
                total, reason = self._apply(number, norms)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": number + 1,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": total,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": sum(map(self._tokens, batch)),
            "seconds": time.perf_counter() - started,
            **figures,
            "skipped": reason,
        }

    def log_probabilities(
        self, examples: list[Example], what: str, progress: bool
    ) -> list[list[float | None]]:
        """Mean log-probability per token of each continuation, and rejected one where there is."""
        scores = self._scores(examples, what, progress)
        return [[None if s is None else s.mean.item() for s in pair] for pair in scores]

    def reference_of(self, examples: list[Example], progress: bool) -> list[list[float]]:
        """Totals under the weights there are, of all that is to be compared with a reference."""
        scores = self._scores(self._compared(examples), "reference", progress)
        return [[s.total.item() for s in pair] for pair in scores]

    def take_reference(self, examples: list[Example], totals: list[list[float]]) -> None:
        self.reference = dict(zip(self._compared(examples), totals, strict=True))

    def _compared(self, examples: list[Example]) -> list[Example]:
        if not self.objective.needs_reference:
            return []
        return list(dict.fromkeys(e for e in examples if e.rejected_ids is not None))

    @torch.no_grad()
    def _scores(
        self, examples: list[Example], what: str, progress: bool
    ) -> Iterator[tuple[SequenceLogProbs, SequenceLogProbs | None]]:
        parts = range(0, len(examples), self.at_once)
        for first in tqdm(
            parts, desc=what, unit="batch", disable=not (progress and parts), leave=False
        ):
            part = examples[first : first + self.at_once]
            pairs = [e for e in part if e.rejected_ids is not None]
            scores = SequenceLogProbs.of(
                *token_log_probabilities(
                    self.model,
                    [e.context_ids for e in (*part, *pairs)],
                    [*(e.continuation_ids for e in part), *(e.rejected_ids for e in pairs)],
                )
            )
            rejected = iter(range(len(part), len(part) + len(pairs)))
            for row, example in enumerate(part):
                other = None if example.rejected_ids is None else scores[next(rejected)]
                yield scores[row], other

    def _backward(self, batch: list[Example]) -> tuple[float, dict[str, float]]:
        """The batch's mean loss, its gradient left in the parameters, and the mean figures."""
        whole, figures = 0.0, defaultdict(list)
        for first in range(0, len(batch), self.at_once):
            part = batch[first : first + self.at_once]
            reference = None
            if self.objective.needs_reference:
                totals = [self.reference.get(example, (0.0, 0.0)) for example in part]
                reference = torch.tensor(totals)
            losses, report = example_losses(
                self.model,
                [example.context_ids for example in part],
                [example.continuation_ids for example in part],
                [example.rejected_ids for example in part],
                self.objective,
                reference,
            )
            loss = losses.sum() / len(batch)
            whole += loss.item()
            if not math.isfinite(whole):
                break
            for name, values in report.items():
                figures[name] += values.tolist()
            with self.optimizer.step_in_backward() if self._steps_itself else nullcontext():
                loss.backward()
        return whole, {name: sum(values) / len(values) for name, values in figures.items()}

    def _apply(self, number: int, norms: dict[str, Tensor]) -> tuple[float | None, str | None]:
        """Update the parameters: the gradient's norm, and why not if nothing was done."""
        if not self.step_in_backward:
            norms |= {n: _grad_norm(p) for n, p in self.trained.items() if p.grad is not None}
        found = {name: norm.item() for name, norm in norms.items()}
        if wild := [name for name, norm in found.items() if not math.isfinite(norm)]:
            return None, f"gradient of {wild[0]} is {found[wild[0]]}"
        total = math.sqrt(sum(norm * norm for norm in found.values()))
        for name, norm in found.items():
            self.gradients[name] += norm * norm
        if self.clip is not None and total > self.clip:
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip / total)
        if self.dry_run and number == 0 and not self.step_in_backward:
            for name, parameter in self.trained.items():
                self._expect(name, parameter)
        if not (self.dry_run or self.step_in_backward):
            self.optimizer.step()
        return total, None

    @property
    def _steps_itself(self) -> bool:
        return self.step_in_backward and not self.dry_run

    @contextmanager
    def _seeing_gradients(self, number: int, norms: dict[str, Tensor]) -> Iterator[None]:
        """Where gradients are gone as soon as they are used: take their norms as they arrive."""

        def hook(name: str) -> Callable[[Tensor], None]:
            def see(parameter: Tensor) -> None:
                norms[name] = _grad_norm(parameter)
                if self.dry_run:
                    if number == 0:
                        self._expect(name, parameter)
                    parameter.grad = None

            return see

        hooks = []
        try:
            if self.step_in_backward:
                for name, parameter in self.trained.items():
                    hooks.append(parameter.register_post_accumulate_grad_hook(hook(name)))
            yield
        finally:
            for each in hooks:
                each.remove()

    def _expect(self, name: str, parameter: nn.Parameter) -> None:
        """What the first step would do to a parameter, tried on a copy of it."""
        if parameter.grad is None:
            return
        twin = nn.Parameter(parameter.detach().clone())
        twin.grad = parameter.grad.clone()
        optimizer = self.make([(name, twin)])
        optimizer.state[twin] = copy.deepcopy(self.optimizer.state.get(parameter, {}))
        for group in optimizer.param_groups:
            group["lr"] *= self._factor(0)
        optimizer.step()
        change = twin.detach().float() - parameter.detach().float()
        self.expected[name] = (
            change.norm().item(),
            (change != 0).float().mean().item(),
            (change * parameter.grad.float()).sum().item(),
        )

    def _tokens(self, example: Example) -> int:
        rejected = example.rejected_ids if self.objective.needs_rejected else None
        return len(example.context_ids) + len(example.continuation_ids) + len(rejected or ())

    def _factor(self, number: int) -> float:
        if number < self.warmup_steps:
            return (number + 1) / self.warmup_steps
        gone = (number - self.warmup_steps) / max(1, self.n_steps - self.warmup_steps)
        return {
            "constant": 1.0,
            "linear": 1 - gone,
            "cosine": 0.5 * (1 + math.cos(math.pi * gone)),
        }[self.schedule]


@contextmanager
def _tensorboard(run: SavedRun | None, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Writes figures where TensorBoard finds them, if it is installed and there is a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if run is None or SummaryWriter is None:
        yield lambda record: None
        return
    with SummaryWriter(run.path / "tensorboard", purge_step=done + 1) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name not in ("step", "skipped") and value is not None:
                    writer.add_scalar(name, value, record["step"])

        yield write


def _shown(record: Mapping[str, Any]) -> str:
    if record["skipped"]:
        return f"skipped: {record['skipped']}"
    speed = record["tokens"] / record["seconds"]
    return f"loss {record['loss']:.4f}, grad {record['grad_norm']:.3g}, {speed:,.0f} tokens/s"


def _grad_norm(parameter: Tensor) -> Tensor:
    return torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
