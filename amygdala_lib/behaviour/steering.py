"""Whether steering along a behaviour's direction makes its first pole likelier than its second."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..artefacts import provenance
from ..directions import Directions
from ..errors import SteeringError
from ..evaluate.figures import times_drawn
from ..models import LanguageModel
from ..steering import steer
from .direction import groups_of, unit_difference
from .pairs import Behaviour, Pair, Split
from .reading import log_probabilities, read_answers

OWN = "behaviour"
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class BehaviourSteering:
    """How strength moves a model between the poles, by the chance it gives to written answers.

    `frame` has a row per split, direction and strength. `preference` is the mean over pairs of
    log p(first answer) - log p(second answer), each in nats per token, with a 95% bootstrap
    interval; the columns named after the poles are the two means it is the difference of: if both
    fall, steering damages the model more than it turns it. The direction `behaviour` is the one
    that was given; `dealt 1` and so on are made from the same pairs with the poles swapped in a
    random half of them, so that what the poles have in common over all pairs is gone.
    """

    frame: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)

    def slopes(self, split: Split = "held_out") -> pd.Series:
        """Least-squares slope of preference by strength for each direction."""
        rows = self.frame[self.frame["split"] == split]
        return pd.Series(
            {
                name: np.polyfit(curve["strength"], curve["preference"], 1)[0]
                for name, curve in rows.groupby("direction", sort=False)
            }
        )

    def summary(self) -> str:
        """What was found, in some lines of at most 100 characters."""
        facts, slopes, ends = self.provenance, self.slopes(), self._ends("held_out")
        own, dealt = slopes[OWN], slopes.drop(OWN)
        first, second = facts["poles"]
        weakest, strongest = ends["strength"]
        steeper = int((dealt >= own).sum())
        lines = [
            f"{facts['behaviour']} on {facts['model']}, steered at layers "
            f"{', '.join(map(str, facts['layers']))}: from strength {weakest:g} to {strongest:g} "
            f"the preference for {first} over {second} goes from {_from_to(ends)} nats per token "
            "on held-out pairs.",
            f"Slope {own:+.4f} per unit of strength; with the poles dealt at random "
            f"{dealt.min():+.4f} to {dealt.max():+.4f} ({len(dealt)} deals).",
            f"NOTHING IS SHOWN: {steeper} of {len(dealt)} random deals turn it as much or more."
            if steeper or own <= 0
            else f"Steering turns it toward {first}, more than any of {len(dealt)} random deals.",
        ]
        if "control" in set(self.frame["split"]):
            lines.append(
                f"Control, where the first answer is wrong: {_from_to(self._ends('control'))}. "
                "What rises here is over-obedience."
            )
        return "\n".join(textwrap.fill(line, 100) for line in lines)

    def _ends(self, split: Split) -> pd.DataFrame:
        rows = self.frame[(self.frame["split"] == split) & (self.frame["direction"] == OWN)]
        return rows.sort_values("strength").iloc[[0, -1]]


def _from_to(ends: pd.DataFrame) -> str:
    return " to ".join(f"{preference:+.3f}" for preference in ends["preference"])


def steering_check(
    lm: LanguageModel,
    behaviour: Behaviour,
    directions: Directions,
    strengths: Iterable[float] = (-0.5, -0.25, 0.0, 0.25, 0.5),
    *,
    layers: Iterable[int] | None = None,
    random_deals: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> BehaviourSteering:
    """The preference for a behaviour's first pole at each strength, on held-out and control pairs.

    Needs no judge and no generation, so any model that writes will do: it is asked how likely the
    written answers are. `directions` are those of `behaviour_directions`, steered at `layers` (all
    of theirs unless some are named), in conversation and answer alike. Random deals are read with
    the same pool and template, pushed equally far, and tried on held-out pairs; a slope above all
    of n of them has p = 1 / (n + 1), so 19 are needed for 0.05.

    Raises SteeringError for directions that are not of this behaviour, fewer than two strengths, or
    what `steer` refuses; ModelError for a model that does not write.
    """
    strengths = sorted(set(strengths))
    _check(behaviour, directions, strengths, random_deals)
    layers = directions.layers if layers is None else sorted(set(layers))
    chat_template = directions.provenance["chat_template"]
    first = next(iter(behaviour.poles))
    for strength in strengths:  # refused before anything is read
        with steer(lm, directions, {first: strength}, layers=layers):
            pass
    jobs = [
        (split, OWN, directions, strength)
        for split in ("held_out", "control")
        if behaviour.of(split)
        for strength in strengths
    ]
    deals = _dealt(lm, behaviour, directions.select(layers=layers), random_deals, seed, progress)
    for number, dealt in enumerate(deals, 1):
        jobs += [("held_out", f"dealt {number}", dealt, strength) for strength in strengths]
    rows, unsteered = [], {}
    interval = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(jobs, "steering answers", unit="setting", mininterval=interval, disable=not progress)
    for split, name, chosen, strength in bar:
        pairs = behaviour.of(split)
        if strength == 0 and split in unsteered:
            found = unsteered[split]
        else:
            with steer(lm, chosen, {first: strength}, layers=layers):
                found = log_probabilities(lm, pairs, chat_template=chat_template)
            if strength == 0:
                unsteered[split] = found
        label = {"split": split, "direction": name, "strength": strength}
        rows.append(label | _preference(found, pairs, list(behaviour.poles), seed))
    written_by = ("format_version", "versions")
    origin = {k: v for k, v in directions.provenance.items() if k not in written_by}
    return BehaviourSteering(
        frame=pd.DataFrame(rows),
        provenance=provenance(
            **origin,
            poles=list(behaviour.poles),
            layers=layers,
            strengths=strengths,
            random_deals=random_deals,
            seed=seed,
        ),
    )


def _check(
    behaviour: Behaviour, directions: Directions, strengths: list[float], random_deals: int
) -> None:
    """Raises SteeringError with all that is wrong with what is to be compared."""
    problems, made_from = [], directions.provenance.get("corpus_hash")
    if directions.concepts != [next(iter(behaviour.poles))] or made_from != behaviour.hash:
        problems.append(
            f"directions of {', '.join(directions.concepts)} were not made from this state of "
            f"{behaviour.name}: make them with behaviour_directions(lm, behaviour)"
        )
    if len(strengths) < 2:
        problems.append(f"strengths are {strengths}: a curve needs two or more that differ")
    if random_deals < 1:
        problems.append(f"random_deals is {random_deals}: the slope needs one to compare with")
    if problems:
        raise SteeringError("\n".join(problems))


def _dealt(
    lm: LanguageModel,
    behaviour: Behaviour,
    directions: Directions,
    number: int,
    seed: int,
    progress: bool,
) -> list[Directions]:
    """The same directions made anew, with the poles swapped in a random half of the groups."""
    facts = directions.provenance
    answers = read_answers(
        lm,
        behaviour.train,
        directions.layers,
        pool=facts["pool"],
        chat_template=facts["chat_template"],
        progress=progress,
    )
    return [
        replace(
            directions,
            vectors={n: unit_difference(values, signs) for n, values in answers.values.items()},
        )
        for signs in random_signs(groups_of(behaviour.train), number, seed)
    ]


def random_signs(
    groups: Int[np.ndarray, " pairs"], number: int, seed: int
) -> Int[Tensor, "deals pairs"]:
    """1 or -1 for each pair in each deal: half of the groups have -1, and all of a group the same.

    Half and not by coins: what all pairs have in common then cancels, however few they are.
    """
    rng = np.random.default_rng(seed)
    half = np.where(np.arange(groups.max() + 1) % 2, 1, -1)
    return torch.from_numpy(np.stack([rng.permutation(half)[groups] for _ in range(number)]))


def _preference(
    found: Float[np.ndarray, "pairs 2"], pairs: Sequence[Pair], poles: list[str], seed: int
) -> dict[str, float]:
    """The mean preference with its interval, and the mean log-probability at each pole."""
    groups = groups_of(pairs)
    counts = times_drawn(groups.max() + 1, _RESAMPLES, np.random.default_rng(seed))[:, groups]
    each = found[:, 0] - found[:, 1]
    low, high = np.quantile(counts @ each / counts.sum(1), [0.025, 0.975])
    return {
        "preference": each.mean(),
        "preference_low": low,
        "preference_high": high,
        **dict(zip(poles, found.mean(0), strict=True)),
    }
