"""Figures of one set of scores: AUROC, average precision, their intervals and p-values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from scipy.stats import false_discovery_control, norm, rankdata

Scores = Float[np.ndarray, "texts concepts"]
Labels = Bool[np.ndarray, "texts concepts"]
PerConcept = Float[np.ndarray, " concepts"]
Interval = tuple[np.ndarray, np.ndarray]

EXACT_UP_TO = 20
"""With more positives than this the normal approximation is as good as the exact distribution."""


def auroc(scores: Scores, positive: Labels) -> PerConcept:
    """The chance that a positive scores above a negative, ties counting half; all columns at once.

    A text whose score is NaN does not count in that column. NaN for a column without positives or
    without negatives. Source: the Mann-Whitney U statistic.
    """
    counted = ~np.isnan(scores)
    # At the bottom, where they do nothing but shift the ranks of all others by their number.
    ranks = rankdata(np.where(counted, scores, -np.inf), axis=0) - (~counted).sum(0)
    positive = positive & counted
    n_positive = positive.sum(0).astype(float)
    n_negative = counted.sum(0) - n_positive
    u = np.where(positive, ranks, 0).sum(0) - n_positive * (n_positive + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return u / (n_positive * n_negative)


def auroc_of_each(
    scores: Float[np.ndarray, "texts directions"], positive: Labels
) -> Float[np.ndarray, "directions concepts"]:
    """The AUROC of every direction for every concept, where `auroc` takes them in pairs."""
    n_positive = positive.sum(0).astype(float)
    n_negative = len(scores) - n_positive
    u = rankdata(scores, axis=0).T @ positive.astype(float) - n_positive * (n_positive + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return u / (n_positive * n_negative)


def average_precision(scores: Scores, positive: Labels) -> PerConcept:
    """The mean over positives of the precision among texts that score at least as high.

    By chance it is the share of positives. A text whose score is NaN does not count in that column.
    NaN for a column without positives.
    """
    counted = ~np.isnan(scores)
    positive = positive & counted
    falling = np.where(counted, -scores, np.inf)
    as_high = rankdata(falling, method="max", axis=0)
    positives_as_high = rankdata(np.where(positive, falling, np.inf), method="max", axis=0)
    total = np.where(positive, positives_as_high / as_high, 0).sum(0)
    with np.errstate(invalid="ignore"):
        return total / positive.sum(0)


def auroc_intervals(scores: Scores, positive: Labels, *, draws: int, seed: int) -> Interval:
    """95% bootstrap intervals of `auroc`: positives and negatives resampled, each `draws` times.

    The scores are taken as given: in cross-validation the interval leaves out how directions vary.
    With perfect separation it is (1, 1), which for two or three positives says little.
    """
    low, high = np.full((2, scores.shape[1]), np.nan)
    counted = ~np.isnan(scores)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for column, (is_positive, counts) in enumerate(zip(positive.T, counted.T, strict=True)):
        n_positive = int((is_positive & counts).sum())
        alike[n_positive, int(counts.sum()) - n_positive].append(column)
    for (n_positive, n_negative), columns in alike.items():
        if not n_positive or not n_negative:
            continue
        chosen, labels, valid = scores.T[columns], positive.T[columns], counted.T[columns]
        of_positives = chosen[labels & valid].reshape(len(columns), n_positive, 1)
        of_negatives = chosen[~labels & valid].reshape(len(columns), 1, n_negative)
        wins = (of_positives > of_negatives) + np.float32(0.5) * (of_positives == of_negatives)
        rng = np.random.default_rng([seed, n_positive, n_negative])
        positives_drawn = times_drawn(n_positive, draws, rng)
        negatives_drawn = times_drawn(n_negative, draws, rng)
        by_positive = wins.reshape(-1, n_negative) @ negatives_drawn.T
        by_positive = by_positive.reshape(len(columns), n_positive, draws) * positives_drawn.T
        found = by_positive.sum(1) / (n_positive * n_negative)
        low[columns], high[columns] = np.quantile(found, [0.025, 0.975], axis=1)
    return low, high


def times_drawn(n: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws n"]:
    """How often each of n is in each of `draws` samples of n with replacement."""
    chosen = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=draws * n)
    return counts.reshape(draws, n).astype(np.float32)


def over_concepts(
    values: PerConcept, statistic: Callable[..., np.ndarray], *, draws: int, seed: int
) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of concepts' values; NaN values are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    rng = np.random.default_rng([seed, len(values)])
    drawn = values[rng.integers(len(values), size=(draws, len(values)))]
    low, high = np.quantile(statistic(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n texts; unlike a bootstrap it has width at 0 and 1."""
    if not n:
        return np.nan, np.nan
    z = norm.ppf(0.975)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def moderated(aurocs: PerConcept) -> PerConcept:
    """Cross-validated AUROCs, their distance from 0.5 divided by sqrt(2), for `p_of_labels`.

    Two texts of a concept in different folds score one another, through nearly the same product of
    the two. The sum over texts so counts each product twice, and where nothing is to be found it
    varies up to sqrt(2) times as much as with a direction from elsewhere. Taken as they are, 12% of
    concepts in pure noise come out below p = 0.05.
    """
    return 0.5 + (aurocs - 0.5) / np.sqrt(2)


def p_against_random(
    aurocs: PerConcept, of_random: Float[np.ndarray, "draws concepts"]
) -> PerConcept:
    """(1 + random directions whose AUROC is at least as high) / (1 + draws); NaN stays NaN."""
    at_least = (of_random >= aurocs - 1e-9).sum(0)
    return np.where(np.isnan(aurocs), np.nan, (1 + at_least) / (1 + len(of_random)))


def p_of_labels(
    aurocs: PerConcept, n_positive: Int[np.ndarray, " concepts"], n_texts: int | np.ndarray
) -> PerConcept:
    """The chance of so high an AUROC or a higher one if labels were dealt out at random.

    Exact (Mann-Whitney, as without ties) for up to `EXACT_UP_TO` positives: with two of them the
    normal approximation, which is used for more, is off. NaN stays NaN.
    """
    n_texts = np.broadcast_to(n_texts, aurocs.shape)
    found = np.full(len(aurocs), np.nan)
    tails: dict[tuple[int, int], np.ndarray] = {}
    for i in np.flatnonzero(~np.isnan(aurocs)):
        m = int(n_positive[i])
        n = int(n_texts[i]) - m
        u = aurocs[i] * m * n
        if m > EXACT_UP_TO:
            spread = np.sqrt(m * n * (m + n + 1) / 12)
            found[i] = norm.sf((u - 0.5 - m * n / 2) / spread)
            continue
        if (m, n) not in tails:
            tails[m, n] = _rank_sum_tail(m, n)
        # By symmetry U >= u is as likely as U <= m n - u.
        found[i] = tails[m, n][min(m * n, int(np.ceil(m * n - u - 1e-6)))]
    return found


def _rank_sum_tail(m: int, n: int) -> Float[np.ndarray, " outcomes"]:
    """P(U <= u) for u = 0 ... m n, from the Gaussian binomial that counts the ways to each U.

    The ways are prod over i from 1 to m of (1 - q^(n + i)) / (1 - q^i); multiplied out from the
    lowest power up, so that the small counts of the tail are not lost beside the large ones.
    """
    ways = np.zeros(m * n + 1)
    ways[0] = 1
    for i in range(1, m + 1):
        ways[n + i :] -= ways[: max(0, len(ways) - n - i)].copy()
        for start in range(i):
            ways[start::i] = np.cumsum(ways[start::i])
    total = np.exp(gammaln(m + n + 1) - gammaln(m + 1) - gammaln(n + 1))
    lower = np.cumsum(ways[: m * n // 2 + 1]) / total
    # P(U <= u) = 1 - P(U <= m n - u - 1): the upper half from the lower.
    upper = 1 - np.concatenate([[0], lower])[: m * n - m * n // 2][::-1]
    return np.concatenate([lower, upper]).clip(0, 1)


def adjusted(p: PerConcept) -> PerConcept:
    """Benjamini-Hochberg: at 0.05, one in twenty of the concepts called significant is not.

    Not Holm: no p against random directions is below 1 / (1 + draws), and with hundreds of concepts
    Holm would multiply it past 0.05 however good the directions were. NaN does not count.
    """
    found, valid = np.full(len(p), np.nan), ~np.isnan(p)
    if valid.any():
        found[valid] = false_discovery_control(p[valid])
    return found
