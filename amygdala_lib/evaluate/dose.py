"""The dose test: whether a score rises as a number makes a situation graver or better."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from ..artefacts import provenance
from ..capture import Activations, Pool, capture
from ..errors import AmygdalaError
from ..models import LanguageModel, depth_label
from ..readout import Readout

HOLE = "{dose}"
FEWEST_DOSES, MOST_DOSES = 8, 12
"""With fewer no p-value outlives the adjustment for many pairs; with more none is exact in time."""
SIGNIFICANT = 0.05
LISTED, WIDTH = 10, 100
"""Pairs that a summary lists and characters in a line, to fit a screen."""
_DRAWN_AT_ONCE = 100


@dataclass(frozen=True)
class Scenario:
    """A sentence with one hole for a number, and what should rise (1) or fall (-1) with it."""

    name: str
    text: str
    doses: tuple[float, ...]
    concepts: Mapping[str, int]


@dataclass(frozen=True)
class Doses:
    """Scenarios, and a control: a sentence in which the same numbers mean nothing."""

    scenarios: tuple[Scenario, ...]
    control: str


@dataclass(frozen=True, eq=False)
class DoseTest:
    """How scores move with the dose, beside chance, random directions and a control sentence.

    `frame` has a row per scenario and concept: `rho` (Spearman, of score and dose); `p`, the exact
    chance of a rho so far in the `expected` direction (1 or -1) if scores were dealt out to the
    doses at random; `p_adjusted`, after Holm over all rows; `random_share`, the share of random
    directions whose rho is as far in that direction; `change`, the mean score of the higher half of
    the doses less that of the lower half (z-scores); the same of the control sentence as
    `control_*`. `shown` is whether `p_adjusted` and `random_share` are both below 0.05 and `change`
    is further in the expected direction than `control_change`.

    A small `p` alone says little: what a model makes of a growing number changes steadily, and
    many directions follow it. `random_share` is not adjusted: by chance 5% of rows fall below 0.05.
    What speaks for all rows together is `agreement`, the mean of `expected * rho`, with
    `p_agreement`, how often sets of random directions with the cosines of the concepts reach it.

    `curves` has the scores themselves, a row per scenario, concept and dose, as
    `plots.dose_curves` draws them. `left_out` names concepts that the readout lacks.
    """

    frame: pd.DataFrame
    curves: pd.DataFrame
    agreement: float
    p_agreement: float
    control_agreement: float
    left_out: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def finding(self) -> str:
        """What was found, short enough for the title of a figure."""
        number, pairs = int(self.frame["shown"].sum()), len(self.frame)
        share = f"{number} of {pairs} pairs follow" if number else f"None of {pairs} pairs follows"
        return f"{share} the dose beyond chance, random directions and a control"

    def summary(self) -> str:
        """What was found, in at most 24 lines of 100 characters."""
        facts, frame = self.provenance, self.frame
        shown = frame[frame["shown"]].sort_values(["random_share", "p_adjusted"], kind="stable")
        lines = [
            f"Dose test of {facts['model']} at {depth_label(facts['layer'], facts['n_layers'])}, "
            f"pool {facts['pool']!r}: {frame['scenario'].nunique()} scenarios, "
            f"{len(frame)} pairs of scenario and concept.",
            f"Mean rho in the expected direction {self.agreement:+.2f} (p = {self.p_agreement:.4f} "
            f"against {facts['draws']} sets of random directions); in the control sentence "
            f"{self.control_agreement:+.2f}.",
            self._verdict(),
        ]
        lines = [textwrap.fill(line, WIDTH) for line in lines]
        if len(shown):
            lines.append(_table(shown.head(LISTED)))
        if len(shown) > LISTED:
            lines.append(f"  and {len(shown) - LISTED} more in .frame")
        return "\n".join([*lines, *(textwrap.fill(r, WIDTH) for r in self._remarks())])

    def _verdict(self) -> str:
        frame, number = self.frame, int(self.frame["shown"].sum())
        chance = "by more than chance, 95% of random directions and the control"
        together = self.p_agreement < SIGNIFICANT and self.agreement > self.control_agreement
        if number:
            verdict = f"{number} of {len(frame)} pairs move as expected {chance}."
            if not together:
                verdict += " All pairs together do not: some of these may be luck."
        elif together:
            verdict = (
                f"No single pair is shown to move as expected {chance}, but all pairs together "
                "lean the expected way, by their mean rho."
            )
        else:
            verdict = f"NOTHING IS SHOWN: no pair moves as expected {chance}, nor do all together."
        by_order = frame["p_adjusted"] < SIGNIFICANT
        if as_random := int((by_order & (frame["random_share"] >= SIGNIFICANT)).sum()):
            verdict += f" {as_random} follow the dose, but no more than random directions do."
        return verdict

    def _remarks(self) -> list[str]:
        remarks = []
        signed = self.frame.assign(signed=self.frame["expected"] * self.frame["rho"])
        against = signed[signed["signed"] < 0].nsmallest(3, "signed")
        if len(against):
            named = (f"{r.concept} in {r.scenario} {r.rho:+.2f}" for r in against.itertuples())
            number = int((signed["signed"] < 0).sum())
            remarks.append(f"Against expectation: {number} pairs, the most {', '.join(named)}.")
        constant = self.curves.groupby(["scenario", "concept"])["score"].nunique() == 1
        if constant.any():
            remarks.append(
                f"{int(constant.sum())} pairs score the same at every dose: where the embedding of "
                "the last token is read, it does not see the number; pool='mean' does."
            )
        if self.left_out:
            some = ", ".join(self.left_out[:LISTED])
            rest = f" and {len(self.left_out) - LISTED} more" * (len(self.left_out) > LISTED)
            remarks.append(f"Not in this readout, and left out: {some}{rest}.")
        made_with, pool = self.provenance["directions_pool"], self.provenance["pool"]
        if made_with not in (None, pool):
            remarks.append(f"The directions were made with pool={made_with!r}, read by {pool!r}.")
        return remarks


def load_doses(source: Path | str | Mapping[str, Any] | None = None) -> Doses:
    """Scenarios and control of a YAML file, or of a mapping of its form; None gives the shipped.

    `control` is a text, `scenarios` a list of objects with `name`, `text`, `doses` (8 to 12 rising
    numbers) and `concepts` (a mapping to 1 or -1); each text has one `{dose}`. Let it go on after
    the hole, so that the last token is the same at every dose.

    Raises AmygdalaError with everything that is wrong.
    """
    name, content = "the doses", source
    if source is None or isinstance(source, str | Path):
        path = Path(__file__).with_name("doses.yaml") if source is None else Path(source)
        name, content = str(path), _read_yaml(path)
    problems = _wrong_content(content)
    if problems:
        raise AmygdalaError("\n".join(f"{name}: {problem}" for problem in problems))
    scenarios = (
        Scenario(
            s["name"],
            s["text"].strip(),
            tuple(s["doses"]),
            {name: int(way) for name, way in s["concepts"].items()},
        )
        for s in content["scenarios"]
    )
    return Doses(tuple(scenarios), content["control"].strip())


def dose_test(
    lm: LanguageModel,
    readout: Readout,
    doses: Doses | Path | str | Mapping[str, Any] | None = None,
    *,
    layer: int | None = None,
    pool: Pool = "last",
    draws: int = 2000,
    seed: int = 0,
    cache: Path | str | None = "default",
) -> DoseTest:
    """Whether scores rise or fall with a number in the prompt as people's feelings would.

    Every scenario of `doses` (by default those shipped; else anything that `load_doses` takes) and
    the control sentence are captured with each number, read with `pool` at `layer` (by default the
    readout's nearest to two thirds of depth) and projected (`Readout.project`, z-scores). A score
    that does not change has a rho of 0. `draws` is the number of random directions, combinations of
    the prompts' own activations with the cosines that the concepts have among each other.

    The test is that of Sofroniew et al. (2026), where `afraid` rises with the amount of a medicine
    taken. Concepts that the readout lacks are left out and named.

    Raises AmygdalaError with all that is wrong: a layer or hidden size that does not fit, a pool
    that gives no single score, no concept in common, directions that cannot be projected on.
    ModelError for prompts that the model cannot read.
    """
    doses = doses if isinstance(doses, Doses) else load_doses(doses)
    dirs = readout.directions
    if layer is None:
        layer = min(dirs.layers, key=lambda held: abs(held + 1 - len(lm.layers) * 2 / 3))
    if problems := _wrong_arguments(lm, readout, _concepts_of(doses), layer, pool, draws):
        raise AmygdalaError("\n".join(problems))

    texts = [
        p for s in doses.scenarios for t in (s.text, doses.control) for p in _filled(t, s.doses)
    ]
    acts = capture(lm, texts, [layer], pool=pool, cache=cache, progress=False)
    return from_activations(acts, readout, doses, layer, draws=draws, seed=seed)


def from_activations(
    acts: Activations, readout: Readout, doses: Doses, layer: int, *, draws: int, seed: int
) -> DoseTest:
    """The dose test of prompts that were captured with the pool `last` or `mean`."""
    named = _concepts_of(doses)
    dirs = readout.directions
    dirs = dirs.select([concept for concept in named if concept in dirs.concepts], [layer])
    # Equal activations share a row: products of equal rows may differ by rounding, and be ranked.
    values, place = torch.unique(acts[layer], dim=0, return_inverse=True)
    row_of = dict(zip(acts.texts, place.tolist(), strict=True))
    scores = Readout(dirs).project(values, layer).numpy()
    rows, curves, pairs = [], [], []
    for scenario in doses.scenarios:
        here = [row_of[text] for text in _filled(scenario.text, scenario.doses)]
        control = [row_of[text] for text in _filled(doses.control, scenario.doses)]
        for concept, expected in scenario.concepts.items():
            if concept not in dirs.concepts:
                continue
            column = dirs.index(concept)
            found, of_control = scores[here, column], scores[control, column]
            label = {"scenario": scenario.name, "concept": concept, "expected": expected}
            rows.append(label | _figures(found, expected) | _of_control(of_control, expected))
            columns = {"dose": scenario.doses, "score": found, "control_score": of_control}
            curves.append(pd.DataFrame(label | columns))
            pairs.append((column, here))
    frame = pd.DataFrame(rows)
    expected = frame["expected"].to_numpy()
    signed = expected * frame["rho"].to_numpy()
    of_random = expected * random_rhos(values, dirs.similarity(layer), pairs, draws, seed)
    origin = provenance(
        model=acts.model_name,
        revision=acts.model_revision,
        weight_hash=acts.model_hash,
        n_layers=acts.n_layers,
        layer=layer,
        pool=acts.pool,
        directions_pool=dirs.provenance.get("pool"),
        draws=draws,
        seed=seed,
    )
    return DoseTest(
        frame=_completed(frame, random_share=_share_at_least(of_random, signed)),
        curves=pd.concat(curves, ignore_index=True),
        agreement=float(signed.mean()),
        p_agreement=float(_share_at_least(of_random.mean(1), signed.mean())),
        control_agreement=float((expected * frame["control_rho"]).mean()),
        left_out=[concept for concept in named if concept not in dirs.concepts],
        provenance=origin,
    )


def spearman(scores: Float[np.ndarray, "*batch doses"]) -> Float[np.ndarray, "*batch"]:
    """Rank correlation of scores with their place along the last axis; 0 where all are equal."""
    n = scores.shape[-1]
    ranks = rankdata(scores, axis=-1) - (n + 1) / 2
    places = np.arange(n) - (n - 1) / 2
    spread = np.linalg.norm(ranks, axis=-1) * np.linalg.norm(places)
    return np.divide(ranks @ places, spread, out=np.zeros_like(spread), where=spread > 0)


def p_of_rise(scores: Float[np.ndarray, " doses"]) -> float:
    """The chance of so high a rank correlation or a higher one, over all orders of the scores.

    Exact, with ties too: all n! orders are counted by their sum of products of ranks.
    """
    doubled = np.round(2 * rankdata(scores)).astype(int)  # ranks of ties end in one half
    found = int(doubled @ np.arange(1, len(doubled) + 1))
    orders = _orders(tuple(sorted(doubled.tolist())))
    return float(orders[found:].sum() / orders.sum())


@functools.lru_cache(maxsize=64)
def _orders(ranks: tuple[int, ...]) -> np.ndarray:
    """How many orders of the ranks have each sum of place * rank, places from 1.

    Built up place by place over the sets of ranks already placed: 2^n sets instead of n! orders.
    """
    n = len(ranks)
    largest = sum(place * rank for place, rank in enumerate(ranks, 1))
    ways = np.zeros((2**n, largest + 1), dtype=np.int64)
    ways[0, 0] = 1
    for placed in range(2**n):
        place = placed.bit_count() + 1
        for i, rank in enumerate(ranks):
            if not placed >> i & 1:
                more = place * rank
                ways[placed | 1 << i, more:] += ways[placed, : largest + 1 - more]
    return ways[-1].copy()


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """p-values adjusted so that any below a level is a false one no more often than the level.

    Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def random_rhos(
    values: Float[Tensor, "texts hidden"],
    cosines: Float[Tensor, "concepts concepts"],
    pairs: Sequence[tuple[int, Sequence[int]]],
    draws: int,
    seed: int,
) -> Float[np.ndarray, "draws pairs"]:
    """Rank correlations of random directions, for pairs of a concept and the texts of its doses.

    A draw has a direction for each concept, Gaussian with the covariance of the activations as real
    differences are, and on average with the concepts' cosines among each other: what near-synonyms
    find, they find together. Only products of texts are needed, never the directions themselves.
    """
    centred = (values - values.mean(0)).double()
    gram = centred @ centred.T
    gram = (gram / gram.diagonal().mean().clamp(min=1e-30)).float()
    eigenvalues, vectors = torch.linalg.eigh(cosines.double())
    mixing = (vectors * eigenvalues.clamp(min=0).sqrt()).float()
    generator = torch.Generator().manual_seed(seed)
    found = np.empty((draws, len(pairs)))
    for start in range(0, draws, _DRAWN_AT_ONCE):
        number = min(_DRAWN_AT_ONCE, draws - start)
        weights = torch.randn(number, len(cosines), len(gram), generator=generator)
        scores = (mixing @ weights @ gram).numpy()
        for pair, (column, rows) in enumerate(pairs):
            found[start : start + number, pair] = spearman(scores[:, column, rows])
    return found


def _concepts_of(doses: Doses) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*(s.concepts for s in doses.scenarios))))


def _filled(text: str, doses: Sequence[float]) -> list[str]:
    return [text.replace(HOLE, f"{dose:,}") for dose in doses]


def _figures(scores: Float[np.ndarray, " doses"], expected: int) -> dict[str, float]:
    half = len(scores) // 2
    return {
        "rho": float(spearman(scores)),
        "p": p_of_rise(expected * scores),
        "change": float(scores[-half:].mean() - scores[:half].mean()),
    }


def _of_control(scores: Float[np.ndarray, " doses"], expected: int) -> dict[str, float]:
    return {f"control_{name}": value for name, value in _figures(scores, expected).items()}


def _share_at_least(of_random: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(1 + random ones at least as high) / (1 + draws); draws are the first axis of `of_random`."""
    return (1 + (of_random >= found - 1e-9).sum(0)) / (1 + len(of_random))


def _completed(frame: pd.DataFrame, random_share: np.ndarray) -> pd.DataFrame:
    frame = frame.assign(
        p_adjusted=holm(frame["p"].to_numpy()),
        control_p_adjusted=holm(frame["control_p"].to_numpy()),
        random_share=random_share,
    )
    beyond_control = frame["expected"] * (frame["change"] - frame["control_change"]) > 0
    by_order, by_random = (frame[k] < SIGNIFICANT for k in ("p_adjusted", "random_share"))
    frame["shown"] = by_order & by_random & beyond_control
    of_dose = ["rho", "p", "p_adjusted", "random_share", "change"]
    of_control = ["control_rho", "control_p", "control_p_adjusted", "control_change"]
    return frame[["scenario", "concept", "expected", *of_dose, *of_control, "shown"]]


def _table(rows: pd.DataFrame) -> str:
    way = rows["expected"].map({1: "up", -1: "down"})
    columns = {
        "scenario": rows["scenario"],
        "concept": rows["concept"],
        "way": way,
        "rho": rows["rho"].map("{:+.2f}".format),
        "p adjusted": rows["p_adjusted"].map("{:.4f}".format),
        "random": rows["random_share"].map("{:.1%}".format),
        "change": rows["change"].map("{:+.2f}".format),
        "in control": rows["control_change"].map("{:+.2f}".format),
    }
    table = pd.DataFrame(columns).to_string(index=False)
    return "\n".join(f"  {line}" for line in table.splitlines())


def _wrong_arguments(
    lm: LanguageModel,
    readout: Readout,
    named: list[str],
    layer: int,
    pool: str,
    draws: int,
) -> list[str]:
    dirs, problems = readout.directions, []
    concepts = [concept for concept in named if concept in dirs.concepts]
    if layer not in dirs.vectors:
        problems.append(f"this readout has no layer {layer}: it has {dirs.layers}")
    elif layer >= len(lm.layers):
        problems.append(f"{lm.name} has no layer {layer}: its last is {len(lm.layers) - 1}")
    if lm.hidden_size != dirs.hidden_size:
        problems.append(
            f"{lm.name} has a hidden size of {lm.hidden_size}, the readout {dirs.hidden_size}: "
            f"load the model it was made for ({dirs.provenance.get('model', 'not recorded')})"
        )
    if pool not in ("last", "mean"):
        problems.append(f"pool is {pool!r}: a prompt has one score, so choose 'last' or 'mean'")
    if draws < 1:
        problems.append(f"draws is {draws}: give at least 1, or 2000 for a steady share")
    if not concepts:
        problems.append(
            f"the readout has none of the concepts of the doses ({', '.join(named[:LISTED])}, "
            "...): extract some of them, or give doses for those it has"
        )
    if concepts and layer in dirs.vectors:
        kept = dirs.select(concepts, [layer])
        usable = kept.vectors[layer].isfinite().all(1) & kept.means[layer].isfinite()
        usable &= kept.stds[layer].isfinite() & (kept.stds[layer] > 0)
        if not usable.all():
            flawed = [c for c, good in zip(concepts, usable.tolist(), strict=True) if not good]
            problems.append(
                f"directions of {', '.join(flawed)} at layer {layer} are not finite or have no "
                "deviation to measure in: extract them again, or leave them out with select"
            )
    return problems


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AmygdalaError(
            f"{path} cannot be read as YAML ({error}): give a file in the form of the shipped "
            "evaluate/doses.yaml"
        ) from error


def _wrong_content(content: Any) -> list[str]:
    if not isinstance(content, Mapping):
        return [f"is {_shown(content)}, not an object with `control` and `scenarios`"]
    problems = [
        f"unknown field {key!r}: there are version, control and scenarios"
        for key in content
        if key not in ("version", "control", "scenarios")
    ]
    problems += _wrong_text("control", content.get("control"))
    scenarios = content.get("scenarios")
    if not isinstance(scenarios, list) or not scenarios:
        return [*problems, f"scenarios is {_shown(scenarios)}: give a list of at least one"]
    names = [s.get("name") for s in scenarios if isinstance(s, Mapping)]
    for number, scenario in enumerate(scenarios, 1):
        problems += _wrong_scenario(number, scenario)
    twice = dict.fromkeys(str(name) for name in names if name and names.count(name) > 1)
    return problems + [
        f"scenario {name}: several have this name, rename all but one" for name in twice
    ]


def _wrong_scenario(number: int, scenario: Any) -> list[str]:
    fields = ("name", "text", "doses", "concepts")
    if not isinstance(scenario, Mapping):
        return [f"scenario {number} is {_shown(scenario)}: give an object with {', '.join(fields)}"]
    name = scenario.get("name")
    where = f"scenario {name if isinstance(name, str) and name else number}"
    problems = [
        f"{where}: unknown field {key!r}: there are {', '.join(fields)}"
        for key in scenario
        if key not in fields
    ]
    if not isinstance(name, str) or not name.strip():
        problems.append(f"{where}: name is {_shown(name)}: give a word")
    problems += _wrong_text(f"{where}: text", scenario.get("text"))
    problems += [f"{where}: {problem}" for problem in _wrong_doses(scenario.get("doses"))]
    concepts = scenario.get("concepts")
    if not isinstance(concepts, Mapping) or not concepts:
        problems.append(f"{where}: concepts is {_shown(concepts)}: map names to 1 or -1")
    else:
        problems += [
            f"{where}: {concept!r} is {_shown(way)}: say 1 if it rises with the dose, -1 if not"
            for concept, way in concepts.items()
            if isinstance(way, bool) or way not in (1, -1) or not isinstance(concept, str)
        ]
    return problems


def _wrong_text(where: str, text: Any) -> list[str]:
    if not isinstance(text, str):
        return [f"{where} is {_shown(text)}: give a text with one {HOLE}"]
    if (number := text.count(HOLE)) != 1:
        return [f"{where} has {number} holes {HOLE}, it needs one: {_shown(text)}"]
    return []


def _wrong_doses(doses: Any) -> list[str]:
    if not isinstance(doses, list | tuple):
        return [f"doses is {_shown(doses)}: give a list of {FEWEST_DOSES} to {MOST_DOSES} numbers"]
    problems = []
    if not FEWEST_DOSES <= len(doses) <= MOST_DOSES:
        problems.append(f"{len(doses)} doses: give {FEWEST_DOSES} to {MOST_DOSES}")
    wrong = [dose for dose in doses if not _is_number(dose)]
    if wrong:
        problems.append(f"doses {', '.join(map(_shown, wrong))} are not finite numbers")
    elif falls := [f"{b} after {a}" for a, b in itertools.pairwise(doses) if b <= a]:
        problems.append(f"doses must rise from first to last, but there is {', '.join(falls)}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."
