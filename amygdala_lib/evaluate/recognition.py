"""Recognition: which concept a text is taken for, out of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..corpus import Corpus
from .figures import share_interval

Scores = Float[np.ndarray, "texts concepts"]
Labels = Bool[np.ndarray, "texts concepts"]
ACCURACIES = ("top1", "top5", "family")


def clusters_of(corpus: Corpus) -> Bool[np.ndarray, "concepts clusters"] | None:
    """Which cluster of the manifest each concept is in; None for a corpus without a manifest."""
    if not all(name in corpus.manifest for name in corpus.concepts):
        return None
    names = [corpus.manifest[name].cluster for name in corpus.concepts]
    return np.array(names)[:, None] == np.array(cluster_names(corpus))


def cluster_names(corpus: Corpus) -> list[str]:
    """The clusters that concepts of the corpus are in, as `clusters_of` orders them."""
    return sorted({corpus.manifest[name].cluster for name in corpus.concepts})


def accuracies(
    scores: Scores, positive: Labels, clusters: Bool[np.ndarray, "concepts clusters"] | None
) -> dict[str, float]:
    """Shares of texts whose concept scores highest (top1), is among the five highest (top5), or is
    in the cluster of the highest (family), each with Wilson's 95% interval and the chance level.

    Texts count that have a concept with a score. Chance is a concept picked at random.
    """
    counted = (positive & ~np.isnan(scores)).any(1)
    scores, positive = scores[counted], positive[counted]
    candidates = ~np.isnan(scores)
    number, own = candidates.sum(1), (positive & candidates).sum(1)
    order = np.argsort(np.where(candidates, -scores, np.inf), axis=1, kind="stable")
    hits: dict[str, np.ndarray] = {}
    chances: dict[str, np.ndarray] = {}
    for name, k in (("top1", 1), ("top5", 5)):
        # With fewer than five concepts to choose from all of them are among the five.
        hits[name] = (np.take_along_axis(positive, order, 1)[:, :k]).any(1)
        chances[name] = np.minimum(1, k * own / number)
    if clusters is not None:
        own_cluster = (positive.astype(int) @ clusters) > 0
        hits["family"] = (own_cluster & clusters[order[:, 0]]).any(1)
        related = own_cluster.astype(int) @ clusters.T > 0
        chances["family"] = (related & candidates).sum(1) / number
    found: dict[str, float] = {"n_tried": int(counted.sum())}
    for name in ACCURACIES:
        share = float(hits[name].mean()) if name in hits and len(scores) else np.nan
        low, high = share_interval(share, len(scores))
        found |= {name: share, f"{name}_low": low, f"{name}_high": high}
        found[f"{name}_chance"] = (
            float(chances[name].mean()) if name in chances and len(scores) else np.nan
        )
    return found


def confusion(
    scores: Scores, positive: Labels, clusters: Bool[np.ndarray, "concepts clusters"]
) -> Int[np.ndarray, "clusters clusters"]:
    """How many texts of each cluster (rows) score highest for a concept of each (columns).

    Texts count that have a concept with a score. One of several clusters counts in the one that it
    is taken for, if that is among them, and in the first if not.
    """
    counted = (positive & ~np.isnan(scores)).any(1)
    highest = np.argmax(np.where(np.isnan(scores), -np.inf, scores)[counted], axis=1)
    taken_for = clusters[highest].argmax(1)
    own = positive[counted].astype(int) @ clusters > 0
    right = own[np.arange(len(own)), taken_for]
    found = np.zeros((clusters.shape[1],) * 2, dtype=int)
    np.add.at(found, (np.where(right, taken_for, own.argmax(1)), taken_for), 1)
    return found


def mistaken(
    scores: Scores, positive: Labels, rows: Sequence[int], concepts: Sequence[str]
) -> list[dict[str, Any]]:
    """For each concept whose texts are taken for others: the most frequent, and up to three texts.

    `examples` are among `rows`, which name the texts.
    """
    counted = positive & ~np.isnan(scores)
    scored = ~np.isnan(scores).all(1)
    highest = np.argmax(np.where(np.isnan(scores), -np.inf, scores), axis=1)
    missed = scored & ~positive[np.arange(len(scores)), highest]
    found = []
    for column, name in enumerate(concepts):
        texts = np.flatnonzero(counted[:, column] & missed)
        if not len(texts):
            continue
        twin, times = Counter(highest[texts].tolist()).most_common(1)[0]
        examples = [int(rows[text]) for text in texts if highest[text] == twin][:3]
        found.append(
            {
                "concept": name,
                "twin": concepts[twin],
                "taken": times,
                "n_texts": int(counted[:, column].sum()),
                "examples": examples,
            }
        )
    return found
