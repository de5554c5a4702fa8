"""Training jobs: what a server is asked to train, checked whole before anything is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LiveError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..training import Example, Objective

Row = tuple[int, ...]

KINDS = {
    "invalid": 422,
    "full": 429,
    "busy": 409,
    "lost": 503,
    "failed": 500,
    "unknown": 404,
    "down": 503,
}
"""Why a request was refused, with its HTTP status: it is wrong; the queue is full; another trainer
has these weights; the server that owns them has gone; it was tried and did not work; there is no
such job; there is no worker to ask."""

_SHOWN = 60  # characters of a value in a message
_LABEL = 200  # characters
_PATTERNS = 64  # of parameters' names


class Refusal(LiveError):
    """A request that was not carried out; `kind` is one of `KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """What one server trains at most, so that no caller can keep it busy or fill its memory.

    message_bytes: of a job as JSON. queued: jobs that wait. examples: of a job, and as many to
    replay. row_tokens: context and continuation together. tokens: all rows of all steps of a job.
    """

    message_bytes: int = 8 << 20
    queued: int = 16
    examples: int = 4096
    row_tokens: int = 8192
    tokens: int = 10_000_000
    steps: int = 1000
    batch_size: int = 256
    rank: int = 1024
    lr: float = 0.1


class Extent(NamedTuple):
    """The numbers that are allowed: whole unless `real`, None if `none`, not `least` if `above`."""

    least: float
    most: float
    real: bool = False
    none: bool = False
    above: bool = False

    def problem(self, value: object) -> str | None:
        if value is None and self.none:
            return None
        number = type(value) is int or (self.real and type(value) is float)
        if number and self.least <= value <= self.most and not (self.above and value == self.least):
            return None
        what = "a number" if self.real else "a whole number"
        bound = f"above {self.least:g}" if self.above else f"from {self.least:g}"
        return f"{what} {bound} to {self.most:g}" + (", or null" if self.none else "")


OBJECTIVES: dict[str, dict[str, Extent]] = {
    "sft": {},
    "dpo": {
        "beta": Extent(0, 100, real=True, above=True),
        "label_smoothing": Extent(0, 0.49, real=True),
    },
    "dpop": {
        "beta": Extent(0, 100, real=True, above=True),
        "label_smoothing": Extent(0, 0.49, real=True),
        "penalty": Extent(0, 10_000, real=True),
    },
    "orpo": {"weight": Extent(0, 100, real=True)},
}
"""Objectives by name, and the settings of each."""


@dataclass(frozen=True)
class TrainingJob:
    """Examples as token ids, and how to train on them; immutable, and the same as JSON.

    context_ids, continuation_ids, rejected_ids: a row per example, of the training package's
        `Example`; rejected_ids are None where there is none.
    objective, objective_settings: "sft", "dpo", "dpop" or "orpo", and what it takes.
    steps, epochs, batch_size, accumulate, replay_share, seed, schedule, warmup_steps, clip,
    parameters, step_in_backward, dry_run: as in `training.train`.
    replay_context_ids, replay_continuation_ids: general examples, against forgetting.
    settings: of Apollo: lr, rank, betas, eps, weight_decay, scale, proj_refresh, norm_growth_limit,
        stochastic_rounding; what is not named has Apollo's own default. The optimizer goes on from
        the job before; another `rank` than that had starts it anew, as does `fresh_optimizer`.
    label: a name for people, kept with the result and in the history of checkpoints.
    """

    context_ids: tuple[Row, ...]
    continuation_ids: tuple[Row, ...]
    rejected_ids: tuple[Row | None, ...] | None = None
    objective: str = "sft"
    objective_settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: int = 1
    batch_size: int = 16
    accumulate: int = 1
    replay_context_ids: tuple[Row, ...] = ()
    replay_continuation_ids: tuple[Row, ...] = ()
    replay_share: float = 0.25
    seed: int = 0
    schedule: str = "constant"
    warmup_steps: int = 0
    clip: float | None = None
    parameters: tuple[str, ...] = ("*",)
    step_in_backward: bool = False
    dry_run: bool = False
    fresh_optimizer: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def from_json(cls, content: object, limits: Limits | None = None) -> TrainingJob:
        """A job from what `json.loads` gives, every field of which may be wrong.

        Raises Refusal (invalid) with all problems. What only the model can tell is left to
        `problems_for`.
        """
        limits = limits or Limits()
        if not isinstance(content, Mapping):
            raise Refusal("invalid", f"a job is a JSON object, not a {type(content).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(name)[:_SHOWN] for name in content.keys() - known)[:10]
        problems = [f"{name}: no such field" for name in unknown]
        needed = ("context_ids", "continuation_ids")
        problems += [f"{name} is missing" for name in needed if name not in content]
        given = {name: value for name, value in content.items() if name in known}
        problems += [
            problem for name, value in given.items() for problem in _wrong(name, value, limits)
        ]
        if problems:
            raise Refusal("invalid", "\n".join(problems))
        job = cls(**{name: _frozen(value) for name, value in given.items()})
        if problems := _wrong_together(job, limits):
            raise Refusal("invalid", "\n".join(problems))
        return job

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back as it was."""
        return json.loads(json.dumps(asdict(self)))

    def examples(self) -> list[Example]:
        from ..training import Example

        rejected = self.rejected_ids or [None] * len(self.context_ids)
        rows = zip(self.context_ids, self.continuation_ids, rejected, strict=True)
        return [Example(*row) for row in rows]

    def replay(self) -> list[Example]:
        from ..training import Example

        pairs = zip(self.replay_context_ids, self.replay_continuation_ids, strict=True)
        return [Example(*pair) for pair in pairs]

    def batches(self) -> list[list[Example]]:
        """What each step trains on."""
        from ..training.trainer import batches_of

        return batches_of(
            self.examples(),
            self.replay(),
            self.batch_size,
            self.replay_share,
            self.epochs,
            self.steps,
            self.seed,
        )

    def made_objective(self) -> Objective:
        from ..training import objectives

        return objectives.OBJECTIVES[self.objective](**self.objective_settings)

    def problems_for(self, model: PreTrainedModel) -> list[str]:
        """Why this model cannot be trained on it: vocabulary, length, names of parameters."""
        from ..training.trainer import chosen_parameters, wrong_examples, wrong_parameters

        trained = chosen_parameters(model, self.parameters)
        return [
            *wrong_examples(
                model, self.made_objective(), examples=self.examples(), replay=self.replay()
            ),
            *wrong_parameters(trained, self.parameters),
        ]


def _wrong(name: str, value: object, limits: Limits) -> list[str]:
    """What is wrong with one field by itself."""
    if name.endswith("_ids"):
        return _wrong_rows(name, value, limits)
    extents = {
        "steps": Extent(1, limits.steps, none=True),
        "epochs": Extent(1, limits.steps),
        "batch_size": Extent(1, limits.batch_size),
        "accumulate": Extent(1, limits.batch_size),
        "replay_share": Extent(0, 0.99, real=True),
        "seed": Extent(0, 2**63 - 1),
        "warmup_steps": Extent(0, limits.steps),
        "clip": Extent(0, 1e6, real=True, none=True, above=True),
    }
    if name in extents:
        return _said(name, value, extents[name].problem(value))
    if name in ("step_in_backward", "dry_run", "fresh_optimizer"):
        return _said(name, value, None if isinstance(value, bool) else "true or false")
    if name == "objective":
        # A list cannot be looked up in a dictionary, hence the type first.
        known = isinstance(value, str) and value in OBJECTIVES
        return _said(name, value, None if known else f"one of {', '.join(OBJECTIVES)}")
    if name == "schedule":
        schedules = ("constant", "linear", "cosine")
        return _said(name, value, None if value in schedules else f"one of {', '.join(schedules)}")
    if name == "label":
        fits = isinstance(value, str) and len(value) <= _LABEL and value.isprintable()
        return _said(name, value, None if fits else f"a line of at most {_LABEL} characters")
    if name == "parameters":
        fits = (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and 1 <= len(value) <= _PATTERNS
            and all(isinstance(pattern, str) and len(pattern) <= _LABEL for pattern in value)
        )
        return _said(name, value, None if fits else f"a list of 1 to {_PATTERNS} patterns of names")
    if name == "settings":
        return _wrong_mapping(name, value, _apollo(limits))
    return [] if isinstance(value, Mapping) else _said(name, value, "an object")


def _wrong_rows(name: str, value: object, limits: Limits) -> list[str]:
    if value is None and name == "rejected_ids":
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _said(name, value, "a list of lists of token ids")
    if len(value) > limits.examples:
        return [f"{name} has {len(value)} rows: at most {limits.examples} are taken"]
    problems = []
    for number, row in enumerate(value):
        if row is None and name == "rejected_ids":
            continue
        if not isinstance(row, Sequence) or isinstance(row, str):
            problems += _said(f"{name}[{number}]", row, "a list of token ids")
        elif strange := [token for token in row if type(token) is not int]:
            problems += _said(f"{name}[{number}]", strange[0], "token ids, whole numbers")
        elif len(row) > limits.row_tokens:
            problems.append(
                f"{name}[{number}] has {len(row)} tokens: at most {limits.row_tokens} are taken"
            )
    return _first(problems)


def _apollo(limits: Limits) -> dict[str, Callable[[object], str | None]]:
    """What each setting of Apollo may be."""

    def betas(value: object) -> str | None:
        extent = Extent(0, 0.9999999, real=True)
        pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
        fits = pair and not any(extent.problem(beta) for beta in value)
        return None if fits else "two numbers from 0 to below 1"

    def scale(value: object) -> str | None:
        if value == "auto":
            return None
        problem = Extent(0, 1000, real=True, above=True).problem(value)
        return problem and f'"auto" or {problem}'

    def flag(value: object) -> str | None:
        return None if isinstance(value, bool) else "true or false"

    return {
        "lr": Extent(0, limits.lr, real=True, above=True).problem,
        "rank": Extent(1, limits.rank, none=True).problem,
        "betas": betas,
        "eps": Extent(1e-12, 1, real=True).problem,
        "weight_decay": Extent(0, 1, real=True).problem,
        "scale": scale,
        "proj_refresh": Extent(1, 1_000_000).problem,
        "norm_growth_limit": Extent(1, 100, real=True, none=True, above=True).problem,
        "stochastic_rounding": flag,
    }


def _wrong_mapping(
    name: str, value: object, allowed: Mapping[str, Callable[[object], str | None]]
) -> list[str]:
    if not isinstance(value, Mapping):
        return _said(name, value, "an object")
    problems = [
        f"{name}: no {str(key)[:_SHOWN]}, choose from {', '.join(allowed) or '(nothing)'}"
        for key in sorted(map(str, value.keys() - allowed.keys()))[:10]
    ]
    for key in allowed:
        if key in value:
            problems += _said(f"{name}.{key}", value[key], allowed[key](value[key]))
    return problems


def _wrong_together(job: TrainingJob, limits: Limits) -> list[str]:
    """What is wrong with fields that are right one by one."""
    allowed = {name: extent.problem for name, extent in OBJECTIVES[job.objective].items()}
    problems = _wrong_mapping("objective_settings", job.objective_settings, allowed)
    lengths = {"context_ids": len(job.context_ids), "continuation_ids": len(job.continuation_ids)}
    if job.rejected_ids is not None:
        lengths["rejected_ids"] = len(job.rejected_ids)
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        problems.append(f"the examples do not pair up: rows are {shown}")
    if len(job.replay_context_ids) != len(job.replay_continuation_ids):
        problems.append(
            f"the replay does not pair up: {len(job.replay_context_ids)} contexts, "
            f"{len(job.replay_continuation_ids)} continuations"
        )
    if not job.context_ids:
        problems.append("no examples: give at least one")
    if job.accumulate > job.batch_size:
        problems.append(
            f"accumulate is {job.accumulate}, but a batch has {job.batch_size} examples only"
        )
    if job.step_in_backward and (job.clip is not None or job.accumulate > 1):
        problems.append("step_in_backward can neither clip nor accumulate: leave out one of them")
    if problems:
        return problems
    return [*_too_long(job, limits), *_too_much(job, limits)]


def _too_long(job: TrainingJob, limits: Limits) -> list[str]:
    problems = []
    for which, examples in (("example", job.examples()), ("replay", job.replay())):
        for number, example in enumerate(examples):
            longest = max(len(example.continuation_ids), len(example.rejected_ids or ()))
            length = len(example.context_ids) + longest
            if length > limits.row_tokens:
                problems.append(
                    f"{which} {number} has {length} tokens: at most {limits.row_tokens} are taken"
                )
    return _first(problems)


def _too_much(job: TrainingJob, limits: Limits) -> list[str]:
    """Steps and tokens, counted over the whole job."""
    share = job.replay_share if job.replay_context_ids else 0
    examples = job.epochs * len(job.context_ids) / (1 - share)
    steps = job.steps or math.ceil(examples / job.batch_size)
    if steps > limits.steps:
        return [f"{steps} steps: at most {limits.steps} are taken at a time"]
    tokens = sum(
        len(example.context_ids) + len(example.continuation_ids) + len(example.rejected_ids or ())
        for batch in job.batches()
        for example in batch
    )
    if tokens > limits.tokens:
        return [f"{tokens:,} tokens in all steps: at most {limits.tokens:,} are taken at a time"]
    return []


def _said(name: str, value: object, wanted: str | None) -> list[str]:
    return [] if wanted is None else [f"{name} is {repr(value)[:_SHOWN]}: it has to be {wanted}"]


def _first(problems: list[str]) -> list[str]:
    return problems if len(problems) <= 10 else [*problems[:10], f"and {len(problems) - 10} more"]


def _frozen(value: object) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    return dict(value) if isinstance(value, Mapping) else value
