"""Whether a behaviour's direction tells its poles apart in conversations it was not made from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ..artefacts import provenance
from ..evaluate.figures import auroc, times_drawn
from ..models import EMBEDDING, LanguageModel, check_layers, depth_label, weight_hash
from .direction import differences, groups_of
from .pairs import Behaviour, Pair
from .reading import AnswerPool, read_answers

WORDS = "bag of words"
SIGNIFICANT = 0.05

Scores = Float[np.ndarray, "pairs 2"]


@dataclass(frozen=True, eq=False)
class BehaviourEvaluation:
    """How well the poles are told apart, a row of `frame` per reader: each layer, and words alone.

    `train_accuracy` is the share of training pairs whose first answer scores above the second, by
    a direction of the other pairs; `layer` is the one where it is highest. The rest is of pairs
    that nothing was made from or chosen on: `accuracy`, the share of held-out pairs in the right
    order; `auroc`, the chance that a first answer scores above a second one of any pair; both with
    a 95% bootstrap interval (`_low`, `_high`) and the chance `_p` of so high a figure if the poles
    of each pair were dealt out at random. A pair and its mirrors are drawn and dealt together.
    `mirrored` is the accuracy over held-out pairs that have mirrors, where words alone are right
    exactly half of the time. `control` is the share of control pairs whose first answer, the wrong
    one there, scores above the second.
    """

    frame: pd.DataFrame
    layer: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """What was found, in some lines of at most 100 characters."""
        facts, words = self.provenance, self.frame.loc[WORDS]
        row = self.frame[self.frame["layer"] == self.layer].iloc[0]
        first, second = facts["poles"]
        numbers = facts["pairs"]
        right = row["accuracy_p"] < SIGNIFICANT and row["accuracy"] > words["accuracy"]
        verdict = (
            f"The direction tells {first} from {second}, by more than chance and better than words."
            if right
            else f"NOTHING IS SHOWN: {first} is not told from {second} by more than chance and "
            "better than by words alone."
        )
        lines = [
            f"{facts['behaviour']} on {facts['model']}, pool {facts['pool']!r}: "
            f"{numbers['train']} training pairs, {numbers['held_out']} held out.",
            f"Chosen on the training pairs: {depth_label(self.layer, facts['n_layers'])}, "
            f"accuracy {row['train_accuracy']:.2f} (leave-one-out; words {words.train_accuracy:.2f}"
            ").",
            f"Held out: {_with_interval(row, 'accuracy')} of pairs in the right order, AUROC "
            f"{_with_interval(row, 'auroc')}. Words alone: {words['accuracy']:.2f} and "
            f"{words['auroc']:.2f}.",
        ]
        if not pd.isna(row["mirrored"]):
            lines.append(f"Where words cannot tell (mirrors): {row['mirrored']:.2f}, chance 0.50.")
        lines.append(verdict)
        if numbers["control"]:
            lines.append(
                f"Control: in {row['control']:.0%} of {numbers['control']} conversations where the "
                f"first answer is the wrong one, it still reads as {first}."
            )
        return "\n".join(textwrap.fill(line, 100) for line in lines)


def evaluate_behaviour(
    lm: LanguageModel,
    behaviour: Behaviour,
    layers: Iterable[int] | None = None,
    *,
    pool: AnswerPool = "mean",
    chat_template: bool = False,
    draws: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> BehaviourEvaluation:
    """Directions of the training pairs at each layer, tried on held-out and control pairs.

    The embeddings are always read too: what they tell, words told. The bag of words is a logistic
    regression on TF-IDF of words and word pairs of the answers. `draws` is the number of bootstrap
    samples and of ways to deal out the poles. Raises ModelError as `read_answers` does.
    """
    wanted = check_layers(layers, len(lm.layers))
    pairs = [*behaviour.train, *behaviour.held_out, *behaviour.control]
    answers = read_answers(
        lm, pairs, {EMBEDDING, *wanted}, pool=pool, chat_template=chat_template, progress=progress
    )
    n_train = len(behaviour.train)
    trained, tried = groups_of(behaviour.train), groups_of(behaviour.held_out)
    rows = {}
    for layer, values in answers.values.items():
        products = differences(values[:n_train]) @ differences(values[:n_train]).T
        others = trained[:, None] != trained
        scores = (values[n_train:] @ differences(values[:n_train]).mean(0)).double().numpy()
        rows[depth_label(layer, len(lm.layers))] = {
            "layer": layer,
            "train_accuracy": _signs((products.numpy() * others).sum(1)).mean(),
            **figures(scores, tried, draws, seed),
        }
    rows[WORDS] = {"train_accuracy": _words_left_out(behaviour.train, trained)} | figures(
        _words(behaviour.train, pairs[n_train:]), tried, draws, seed
    )
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("reader")
    frame["layer"] = frame["layer"].astype("Int64")
    chosen = frame[frame["layer"].isin(wanted)]
    return BehaviourEvaluation(
        frame=frame,
        layer=int(chosen.loc[chosen["train_accuracy"].idxmax(), "layer"]),
        provenance=provenance(
            model=lm.name,
            revision=lm.revision,
            weight_hash=weight_hash(lm.model),
            n_layers=len(lm.layers),
            behaviour=behaviour.name,
            corpus_hash=behaviour.hash,
            poles=list(behaviour.poles),
            pairs={
                "train": n_train,
                "held_out": len(behaviour.held_out),
                "control": len(behaviour.control),
            },
            pool=pool,
            chat_template=chat_template,
            draws=draws,
            seed=seed,
        ),
    )


def figures(
    scores: Scores, groups: Int[np.ndarray, " held_out"], draws: int, seed: int
) -> dict[str, float]:
    """The columns of `BehaviourEvaluation.frame` from scores of held-out, then control pairs.

    Source of the AUROC: the Mann-Whitney U statistic, ties counting half.
    """
    scores, control = scores[: len(groups)], scores[len(groups) :]
    first_wins = _signs(scores[:, :1] - scores[:, 1])  # of answer i over answer j
    right = first_wins.diagonal()
    rng = np.random.default_rng(seed)
    n_groups = groups.max() + 1
    counts = times_drawn(n_groups, draws, rng)[:, groups]
    totals = counts.sum(1)
    swapped = rng.integers(2, size=(draws, n_groups))[:, groups].astype(bool)
    is_first = np.stack([~swapped, swapped], axis=2).reshape(draws, -1).T
    flat = np.broadcast_to(scores.reshape(-1, 1), is_first.shape)
    found = {
        "accuracy": (
            right.mean(),
            counts @ right / totals,
            np.where(swapped, 1 - right, right).mean(1),
        ),
        "auroc": (
            first_wins.mean(),
            ((counts @ first_wins) * counts).sum(1) / totals**2,
            auroc(flat, is_first),
        ),
    }
    row = {}
    for name, (value, resampled, dealt) in found.items():
        low, high = np.quantile(resampled, [0.025, 0.975])
        at_least = (dealt >= value - 1e-9).sum()
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        row[f"{name}_p"] = (1 + at_least) / (1 + draws)
    has_mirror = np.bincount(groups)[groups] > 1
    row["mirrored"] = right[has_mirror].mean() if has_mirror.any() else np.nan
    row["control"] = _signs(control[:, 0] - control[:, 1]).mean() if len(control) else np.nan
    return row


def _signs(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, one half where neither."""
    return (np.sign(differences) + 1) / 2


def _words(train: Sequence[Pair], tried: Sequence[Pair]) -> Scores:
    """Scores of the answers of `tried` by their words, learnt from the answers of `train`."""
    weights = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
    features = weights.fit_transform([answer for pair in train for answer in pair.answers])
    is_first = np.tile([True, False], len(train))
    model = LogisticRegression(max_iter=1000).fit(features, is_first)
    answers = weights.transform([answer for pair in tried for answer in pair.answers])
    return model.decision_function(answers).reshape(-1, 2)


def _words_left_out(train: Sequence[Pair], groups: Int[np.ndarray, " pairs"]) -> float:
    """`train_accuracy` of words: each pair scored by what the other groups' answers say."""
    right = []
    for group in range(groups.max() + 1):
        here, others = (
            [pair for pair, g in zip(train, groups, strict=True) if (g == group) == own]
            for own in (True, False)
        )
        scores = _words(others, here)
        right += [*_signs(scores[:, 0] - scores[:, 1])]
    return float(np.mean(right))


def _with_interval(row: pd.Series, name: str) -> str:
    low, high, p = (row[f"{name}_{part}"] for part in ("low", "high", "p"))
    return f"{row[name]:.2f} [{low:.2f}, {high:.2f}; p = {p:.4f}]"
