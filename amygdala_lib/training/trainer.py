"""Training in place: context-frozen steps over examples, and an account of what they changed."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..capture import capture
from ..errors import TrainingError
from ..models import LanguageModel, weight_hash
from .apollo import Apollo
from .frozen_context import check_model, check_rows
from .loop import SCHEDULES, Loop
from .objectives import Objective, as_objective
from .replay import mixed_batches
from .result import (
    TrainingResult,
    change_frame,
    log_probability_frame,
    norm_of,
    reading_frame,
    step_frame,
)
from .saved_run import SavedRun

if TYPE_CHECKING:
    from ..readout import Readout
    from .examples import Example

_WATCHED = 64


def train(
    lm: LanguageModel | PreTrainedModel,
    examples: Sequence[Example],
    *,
    objective: str | Objective = "sft",
    optimizer: Callable[..., Optimizer] = Apollo,
    batch_size: int = 16,
    epochs: int = 1,
    steps: int | None = None,
    accumulate: int = 1,
    replay: Sequence[Example] = (),
    replay_share: float = 0.25,
    seed: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup_steps: int = 0,
    clip: float | None = None,
    parameters: Sequence[str] = ("*",),
    step_in_backward: bool = False,
    dry_run: bool = False,
    folder: Path | str | None = None,
    save_every: int = 50,
    optimizer_state: Path | str | None = None,
    watch: Sequence[Example] | None = None,
    readout: Readout | None = None,
    texts: Sequence[str] = (),
    keep_before: bool = True,
    progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Train a model in place on examples, with gradient through their continuations only.

    objective: "sft", "dpo", "dpop", "orpo", or one of `training.objectives` with its settings. The
        loss of a step is the mean over its examples. Reference log-probabilities are computed
        before the first step: the weights that change are the policy. Replay has none to compare,
        and counts by its likelihood.
    optimizer, settings: called as `optimizer(named_parameters, **settings)`: Apollo takes lr, rank,
        weight_decay and more. Known to work at 27B: lr 1e-5 to 2e-5 for sft, 5e-7 for preferences.
    batch_size, epochs, steps: examples per step, and how long: so many epochs, or so many steps
        over as many epochs as that takes. The order depends on the seed only. Batches go on over
        the end of an epoch, so that only the last may be smaller.
    accumulate: a batch goes through the model in so many parts, with the gradient of the whole.
    replay, replay_share: general examples that make up this share of every batch, against
        forgetting.
    schedule, warmup_steps, clip: what the learning rate is multiplied with after a linear warm-up;
        the largest norm the whole gradient may have.
    parameters: patterns of names (`*q_proj*`) of those to train.
    step_in_backward: gradients take the memory of a matrix or two, but can be neither clipped nor
        accumulated, and one that is not finite stops the run half-way through a step.
    dry_run: all of it at the weights there are: losses, gradients, readings, and what the first
        step would change. No weight and no file is written.
    folder: where the run is kept: figures of every step, and every `save_every` steps and at the
        end weights, optimizer and position. A run that was killed is gone on with when called in
        the same way: its weights end up as those of one that was not. A finished one is loaded.
    optimizer_state: a file of an earlier run's optimizer (`TrainingResult.optimizer_state`), to go
        on from with these settings.
    watch: examples whose log-probabilities are taken before and after; by default the first 64.
    readout, texts: what to read in the residual stream of these texts before and after.
    keep_before: keep a copy of the weights in main memory, to say by how much each changed.

    A step whose loss or gradient is not finite changes nothing and is reported. The model runs in
    evaluation mode, without dropout: what is trained is what will be served. Its mode, and whether
    its parameters require gradients, are as before at the end, after an exception too.

    Raises TrainingError, naming all that is wrong, before anything is changed.
    """
    model = lm.model if isinstance(lm, LanguageModel) else lm
    objective, examples, replay = as_objective(objective), list(examples), list(replay)
    watch = examples[:_WATCHED] if watch is None else list(watch)
    check_model(model)
    trained = chosen_parameters(model, parameters)
    run = None if folder is None or dry_run else SavedRun(Path(folder))
    problems = [
        *_wrong_numbers(batch_size, epochs, steps, accumulate, save_every, warmup_steps, clip),
        *_wrong_choices(schedule, step_in_backward, clip, accumulate, optimizer, run),
        *wrong_examples(model, objective, examples=examples, replay=replay, watch=watch),
        *wrong_parameters(trained, parameters, keep_before and not dry_run),
        *_wrong_readout(lm, readout, texts),
        *([] if run is None else run.lacking_room(trained)),
    ]
    if problems:
        raise TrainingError("\n".join(problems))
    batches = batches_of(examples, replay, batch_size, replay_share, epochs, steps, seed)
    if "seed" in inspect.signature(optimizer).parameters:
        settings = {"seed": seed, **settings}
    setting = {
        "objective": repr(objective),
        "optimizer": _name_of(optimizer),
        "settings": {name: repr(value) for name, value in sorted(settings.items())},
        "batches": _hash([[_ids(example) for example in batch] for batch in batches]),
        "watch": _hash([_ids(example) for example in watch]),
        "accumulate": accumulate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "clip": clip,
        "step_in_backward": step_in_backward,
        "parameters": _hash(list(trained)),
        "optimizer_state": None if optimizer_state is None else str(optimizer_state),
    }

    def make(pairs: list[tuple[str, nn.Parameter]]) -> Optimizer:
        try:
            return optimizer(pairs, **settings)
        except TypeError as error:
            raise TrainingError(f"{setting['optimizer']} takes other settings: {error}") from error

    with trainable(model, trained):
        loop = Loop(
            model=model,
            objective=objective,
            trained=trained,
            make=make,
            n_steps=len(batches),
            at_once=math.ceil(batch_size / accumulate),
            schedule=schedule,
            warmup_steps=warmup_steps,
            clip=clip,
            step_in_backward=step_in_backward,
            dry_run=dry_run,
        )
        weights = weight_hash(model)
        measure = partial(_measure, lm, loop, watch, readout, texts, progress)
        start = None if run is None else run.begun(setting)
        if start is None:
            start = {"weights": weights} | measure()
            start["norms"] = {name: norm_of(p) for name, p in trained.items()}
            start["reference"] = loop.reference_of([*examples, *replay], progress)
            if run is not None:
                run.begin(setting, start)
        loop.take_reference([*examples, *replay], start["reference"])
        before = None
        if keep_before and not dry_run and weights == start["weights"]:
            before = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        done = 0 if run is None else _go_back(run, loop, start["weights"], weights)
        if done == 0 and optimizer_state is not None:
            loop.go_on_from(Path(optimizer_state))
        records = loop.run(batches, done, run, save_every, progress)
        end = {"weights": weight_hash(model)} | ({} if dry_run else measure())
    return TrainingResult(
        objective=objective,
        steps=step_frame(records),
        log_probabilities=log_probability_frame(start, end),
        changes=change_frame(loop, start["norms"], records, before),
        readings=None if readout is None else reading_frame(readout.directions, start, end),
        weights_before=start["weights"],
        weights_after=end["weights"],
        dry_run=dry_run,
        folder=None if run is None else run.path,
    )


def _measure(
    lm: LanguageModel | PreTrainedModel,
    loop: Loop,
    watch: list[Example],
    readout: Readout | None,
    texts: Sequence[str],
    progress: bool,
) -> dict[str, Any]:
    """What is compared before and after, as JSON holds it."""
    log_probabilities = loop.log_probabilities(watch, "log-probabilities", progress)
    return {"log_probabilities": log_probabilities, "readings": _readings(lm, readout, texts)}


@contextmanager
def trainable(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the chosen parameters and for no others, and no dropout; then as it was."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chosen = {id(p) for p in trained.values()}
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _go_back(run: SavedRun, loop: Loop, first_weights: str, weights: str) -> int:
    """Put the last state of a run back: the number of steps it had done."""
    restored = run.restore(loop.trained, loop.optimizer)
    if restored is None:
        if weights != first_weights:
            raise TrainingError(
                f"{run.path} has no state yet, and began from weights {first_weights}, but these "
                f"are {weights}: load the model again, or give another folder"
            )
        return 0
    step, gradients = restored
    loop.gradients.update(gradients)
    return step


def batches_of(
    examples: list[Example],
    replay: list[Example],
    batch_size: int,
    share: float,
    epochs: int,
    steps: int | None,
    seed: int,
) -> list[list[Example]]:
    """What each step trains on."""
    if steps is not None:
        epochs = math.ceil(steps * batch_size / len(examples))
    share = share if replay else 0.0
    mixed = mixed_batches(
        examples, replay, batch_size=batch_size, share=share, epochs=epochs, seed=seed
    )
    return mixed[:steps]


def chosen_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Those of floating-point numbers whose name fits one of the patterns, tied ones once."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and any(fnmatchcase(name, p) for p in patterns)
    }


def _wrong_numbers(
    batch_size: int,
    epochs: int,
    steps: int | None,
    accumulate: int,
    save_every: int,
    warmup_steps: int,
    clip: float | None,
) -> list[str]:
    least = {"batch_size": batch_size, "epochs": epochs, "accumulate": accumulate}
    least |= {"save_every": save_every, **({} if steps is None else {"steps": steps})}
    problems = [f"{name} is {value}: it is 1 or more" for name, value in least.items() if value < 1]
    if accumulate > batch_size:
        problems.append(f"accumulate is {accumulate}, but a batch has {batch_size} examples only")
    if warmup_steps < 0:
        problems.append(f"warmup_steps is {warmup_steps}: it is 0 or more")
    if clip is not None and not clip > 0:
        problems.append(f"clip is {clip}: it is above 0, or None")
    return problems


def _wrong_choices(
    schedule: str,
    step_in_backward: bool,
    clip: float | None,
    accumulate: int,
    optimizer: Callable[..., Optimizer],
    run: SavedRun | None,
) -> list[str]:
    name, problems = _name_of(optimizer), []
    if schedule not in SCHEDULES:
        problems.append(f"no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if step_in_backward and not hasattr(optimizer, "step_in_backward"):
        problems.append(f"{name} cannot step in backward: use Apollo")
    if step_in_backward and (clip is not None or accumulate > 1):
        problems.append(
            "step_in_backward can neither clip nor accumulate, the whole gradient is never there: "
            "leave out clip and accumulate, or step_in_backward"
        )
    if run is not None and not hasattr(optimizer, "save_state"):
        problems.append(f"{name} cannot save its state to a folder: use Apollo, or no folder")
    return problems


def wrong_examples(
    model: PreTrainedModel, objective: Objective, **sets: list[Example]
) -> list[str]:
    """Why a model cannot be trained on sets of examples, of which `examples` is one."""
    problems = [] if sets["examples"] else ["no examples: give at least one"]
    for which, examples in sets.items():
        rejected = [e for e in examples if e.rejected_ids is not None]
        for name, rows in (
            (which, [(e.context_ids, e.continuation_ids) for e in examples]),
            (f"rejected of {which}", [(e.context_ids, e.rejected_ids) for e in rejected]),
        ):
            try:
                check_rows(model, [c for c, _ in rows], [c for _, c in rows])
            except TrainingError as error:
                problems.append(f"{name}: {error}")
    lacking = [n for n, e in enumerate(sets["examples"]) if e.rejected_ids is None]
    if objective.needs_rejected and lacking:
        problems.append(
            f"{type(objective).__name__} compares, but examples {lacking} have no rejected_ids: "
            "give them some, or pass them as replay"
        )
    return problems


def wrong_parameters(
    trained: Mapping[str, nn.Parameter], patterns: Sequence[str], keeps: bool = False
) -> list[str]:
    """Why these cannot be trained; `keeps`: with a copy of them in main memory."""
    problems = []
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name in trained)]
    if unmatched or not trained:
        problems.append(f"no parameter is called {', '.join(unmatched)}: see named_parameters()")
    if any(p.dtype == torch.float16 for p in trained.values()):
        problems.append(
            "float16 weights cannot be trained without loss scaling, their gradients vanish: load "
            "the model with dtype=torch.bfloat16 or torch.float32"
        )
    needed = sum(p.numel() * p.element_size() for p in trained.values())
    if keeps and needed > (free := psutil.virtual_memory().available):
        problems.append(
            f"a copy of the weights takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are "
            "free: pass keep_before=False"
        )
    return problems


def _wrong_readout(
    lm: LanguageModel | PreTrainedModel, readout: Readout | None, texts: Sequence[str]
) -> list[str]:
    if (readout is None) != (not texts):
        return ["a readout needs texts to read, and texts a readout: give both or neither"]
    if readout is not None and not isinstance(lm, LanguageModel):
        return ["reading texts takes a tokenizer: pass the LanguageModel, not its model"]
    return []


def _name_of(optimizer: Callable[..., Optimizer]) -> str:
    return getattr(optimizer, "__qualname__", repr(optimizer))


def _ids(example: Example) -> list[tuple[int, ...] | None]:
    return [example.context_ids, example.continuation_ids, example.rejected_ids]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@torch.no_grad()
def _readings(
    lm: LanguageModel | PreTrainedModel, readout: Readout | None, texts: Sequence[str]
) -> list[list[float]] | None:
    """Mean z-score over the texts, a row per layer of the readout and a column per concept."""
    if readout is None:
        return None
    layers = readout.directions.layers
    acts = capture(lm, list(texts), layers, pool="mean", cache=None, progress=False)
    return [readout.project(acts[layer], layer).mean(0).tolist() for layer in layers]
