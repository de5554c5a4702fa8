"""Sweeping: write under every push, on prompts to choose on and on others, and measure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import numpy as np
from tqdm.auto import tqdm

from ..artefacts import provenance
from ..directions import Directions
from ..errors import SteeringError
from ..models import LanguageModel
from .positions import Tokens
from .pushes import Push, finite, jobs, pushes_toward, random_directions
from .steering import steer
from .summary import Summary
from .sweep import CHOICE, HELD_OUT, SteeringSweep
from .targets import Score, target_by_reading, target_by_score
from .trials import Bench


def steering_sweep(
    lm: LanguageModel,
    directions: Directions,
    concepts: Iterable[str | Mapping[str, float]] | None = None,
    *,
    prompts: Sequence[str],
    held_out_prompts: Sequence[str] | None = None,
    strengths: Iterable[float] = (0.2, 0.35, 0.5, 0.65, 0.8),
    layers: Iterable[int] | None = None,
    read_layer: int | None = None,
    score: Score | None = None,
    tokens: Tokens = "all",
    new_tokens: int = 48,
    random_draws: int = 3,
    batch_size: int = 64,
    seed: int = 0,
    allow_other_model: bool = False,
    progress: bool = True,
) -> SteeringSweep:
    """Let `lm` write under every push and measure how well it steers and what it costs.

    `concepts` are names, and mappings for several at once: {"calm": 1, "curious": 0.5} is added
    once for each unit of strength. None takes all of `directions`. Each is tried at each of
    `layers` (None: all of `directions` before `read_layer`) and `strengths`, in units of the mean
    residual norm. A continuation of up to `new_tokens` tokens is sampled for each prompt. Layer
    and strength are to be chosen on `prompts` and reported on `held_out_prompts`; without these,
    every other prompt is held out.

    A text shows a concept if its reading is above 95% of those of the unsteered texts (below 5%
    for a negative weight): the mean z-score over its tokens at `read_layer`, later than all steered
    ones (None: the last of `directions`), with no steering while it is read. `score`, a function
    (texts, concept) -> a number from 0 to 1 for each text (NaN: cannot tell), is taken instead if
    given; it sees the continuations alone. Of several concepts the one a text shows least counts.

    `random_draws` random directions are pushed along as far, at every layer and strength. All
    writing starts from `seed`, and the global random state is as before. Raises SteeringError,
    naming everything that is wrong, before anything is written.
    """
    splits = _splits(prompts, held_out_prompts)
    pushes, strengths = pushes_toward(directions, concepts), list(dict.fromkeys(strengths))
    read_layer = directions.layers[-1] if read_layer is None else read_layer
    if layers is None:
        layers = [layer for layer in directions.layers if layer < read_layer]
    layers = list(dict.fromkeys(layers))
    problems = _problems(pushes, strengths, splits)
    problems += _wrong_layers(directions, layers, read_layer, independent=score is None)
    sizes = {"new_tokens": new_tokens, "batch_size": batch_size, "random_draws": random_draws}
    for name, size in sizes.items():
        least = 0 if name == "random_draws" else 1
        if not isinstance(size, Integral) or size < least:
            problems.append(f"{name} is {size!r}: it is a whole number, {least} or more")
    for push in pushes:
        try:
            with steer(
                lm, directions, push.at(1.0), layers=layers, tokens=tokens,
                allow_other_model=allow_other_model,
            ):  # fmt: skip
                pass
        except SteeringError as error:
            problems += str(error).splitlines()
    if problems:
        raise SteeringError("\n".join(dict.fromkeys(problems)))

    texts = [prompt for held in splits.values() for prompt in held]
    bench = Bench(
        lm, directions, read_layer, texts, new_tokens, tokens, seed, batch_size, allow_other_model
    )
    controls = random_directions(directions, layers, random_draws, seed)
    todo = jobs(pushes, directions, controls, layers, strengths)
    bar = tqdm(
        total=(1 + len(todo)) * len(texts),
        desc=f"writing under {len(pushes)} pushes at layers {', '.join(map(str, layers))}",
        unit="text",
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not progress,
    )
    trials = {}
    with bar:
        unsteered = bench.write(directions, {}, layers)
        bar.update(len(texts))
        if score is None:
            target = target_by_reading(directions, unsteered)
        else:
            target = target_by_score(score)
        for push in pushes:
            target(unsteered, push)  # a score that does not work says so now
        for job in todo:
            trials[job.key] = bench.write(job.directions, job.strengths, [job.key[1]])
            bar.update(len(texts))

    ends = np.cumsum([len(held) for held in splits.values()])
    rows = dict(zip(splits, np.split(np.arange(len(texts)), ends[:-1]), strict=True))
    summary = Summary(
        directions, pushes, layers, strengths, controls.concepts, unsteered, trials, target, rows
    )
    cells, shifts, random_shifts = summary.cells()
    return SteeringSweep(
        cells=cells,
        doses=summary.doses(seed),
        written=summary.written(texts),
        shifts=shifts,
        random_shifts=random_shifts,
        provenance=provenance(
            model=lm.name,
            revision=lm.revision,
            directions=directions.provenance,
            pushes={push.label: push.weights for push in pushes},
            strengths=[float(strength) for strength in strengths],
            layers=[int(layer) for layer in layers],
            read_layer=int(read_layer),
            score=None if score is None else _name(score),
            tokens=str(tokens),
            new_tokens=int(new_tokens),
            random_draws=int(random_draws),
            batch_size=int(batch_size),
            seed=seed,
        ),
    )


def _name(score: Score) -> str:
    """Without an address in memory, so that the same sweep has the same provenance."""
    function = getattr(score, "func", score)  # of a partial
    return getattr(function, "__qualname__", type(function).__name__)


# What is asked for


def _splits(prompts: Sequence[str], held_out: Sequence[str] | None) -> dict[str, list[str]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if held_out is None:
        return {CHOICE: prompts[::2], HELD_OUT: prompts[1::2]}
    return {CHOICE: prompts, HELD_OUT: list(held_out)}


def _problems(
    pushes: Sequence[Push], strengths: Sequence[float], splits: Mapping[str, list[str]]
) -> list[str]:
    problems = []
    if not pushes or not all(push.weights for push in pushes):
        problems.append(
            "there is nothing to steer toward: name concepts, with weights other than 0"
        )
    if not strengths or not all(finite(strength) and strength for strength in strengths):
        problems.append(
            f"strengths are finite numbers other than 0 (no steering is tried anyway): {strengths}"
        )
    prompts = [prompt for held in splits.values() for prompt in held]
    if not all(splits.values()):
        problems.append(
            f"prompts to choose on are {len(splits[CHOICE])}, held out {len(splits[HELD_OUT])}: "
            "give at least one for each"
        )
    if wrong := [p for p in prompts if not isinstance(p, str) or not p.strip()]:
        problems.append(f"prompts are texts with words in them: {wrong}")
    elif both := sorted(set(splits[CHOICE]) & set(splits[HELD_OUT])):
        problems.append(f"prompts that are chosen on cannot be held out too: {both}")
    return problems


def _wrong_layers(
    directions: Directions, layers: Sequence[int], read_layer: int, *, independent: bool
) -> list[str]:
    if read_layer not in directions.vectors:
        return [f"no directions to read with at layer {read_layer}: there are {directions.layers}"]
    if not layers:
        return [
            f"no layers to steer at before layer {read_layer}, where texts are read: there are "
            f"{directions.layers}; extract directions at more"
        ]
    late = [n for n in layers if isinstance(n, Integral) and n >= read_layer]
    if late and independent:
        return [
            f"texts are read at layer {read_layer}, which has to come after the steered ones, but "
            f"layers {late} do not come before it: steer earlier, read later, or pass a score"
        ]
    return []
