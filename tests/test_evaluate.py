"""What is quoted about directions holds: on texts they never saw, beside chance and baselines."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import activations, labelled, made_of
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score, roc_auc_score

from amygdala_lib.capture import capture
from amygdala_lib.corpus import Concept, Text
from amygdala_lib.directions import extract, membership, methods, text_means
from amygdala_lib.directions.extraction import Method
from amygdala_lib.errors import AmygdalaError, ArtefactError
from amygdala_lib.evaluate import (
    Evaluation,
    auroc,
    average_precision,
    evaluate,
    figures,
    separation,
)
from amygdala_lib.evaluate.baselines import Words
from amygdala_lib.evaluate.recognition import accuracies, confusion
from amygdala_lib.evaluate.scores import Reader
from amygdala_lib.evaluate.splits import Part, make_splits

HIDDEN = 64
CONCEPTS = ["afraid", "calm", "curious", "proud", "sad", "stuck"]


def world(
    strength=5.0, *, concepts=CONCEPTS, per_concept=6, heldout=4, hidden=HIDDEN, layers=(2,), seed=0
):
    """A corpus of stories, paired scenarios, held-out texts and hard negatives, and activations.

    A text is noise of standard deviation 1 along each axis, and `strength` along its concept's own.
    Hard negatives lie half as far again, though they are not of the concept; at layer -1 no text
    has it.
    """

    def entry(kind, concept, number, scenario=None):
        version = None if scenario is None else 0
        return Text(f"{kind} {number} of {concept}", kind, concept, scenario, version, "here")

    training = [entry("story", c, n) for c in concepts for n in range(per_concept - 2)]
    training += [
        entry("paired", c, n, f"scenario {n}") for c in [*concepts, None] for n in range(2)
    ]
    held_out = [entry("direct", c, f"held out {n}") for c in concepts for n in range(heldout)]
    hard = [entry(kind, c, 0) for c in concepts for kind in ("negated", "mentioned") if heldout]
    manifest = {
        c: Concept(c, "gloss", "low" if c in ("sad", "stuck") else "other", ("x",), 0.0, 0.0, ())
        for c in concepts
    }
    corpus = dataclasses.replace(
        made_of(training), manifest=manifest, heldout=held_out, hard_negatives=hard
    )
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(hidden, len(concepts), generator=generator))[0].T
    of = {t.text: t.concept for t in (*training, *held_out, *hard)}
    moves = torch.stack(
        [
            axes[concepts.index(of[text])] if of[text] else torch.zeros(hidden)
            for text in corpus.all_texts
        ]
    )
    hard_texts = {t.text for t in hard}
    moves *= torch.tensor([[1.5 if t in hard_texts else 1.0] for t in corpus.all_texts])
    held = {
        layer: 5 + torch.randn(len(moves), hidden, generator=generator)
        + (0 if layer == -1 else strength) * moves
        for layer in layers
    }  # fmt: skip
    norms = dict.fromkeys(layers, 1.0)
    facts = {"layers": list(layers), "residual_norms": norms, "_by_layer": held}
    return corpus, activations(corpus.all_texts, held[layers[0]], **facts)


def quick(corpus, acts, method="pooled", **options):
    return evaluate(acts, corpus, method, **{"draws": 200, "progress": False} | options)


@pytest.fixture(scope="module")
def planted():
    return world(layers=(-1, 2))


@pytest.fixture(scope="module")
def found(planted):
    return quick(*planted, ["pooled", "linear"])


@pytest.fixture
def register(monkeypatch):
    """Registers a method for one test only."""

    def add(name, function, reads_tokens=False):
        monkeypatch.setitem(methods, name, Method(function, reads_tokens))

    return add


# Figures

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40)
BOTH = SCORES.filter(lambda rows: len({positive for _, positive in rows}) == 2)


@given(rows=BOTH)
def test_auroc_and_average_precision_are_those_of_sklearn_with_ties_too(rows):
    scores = np.array([[score] for score, _ in rows], dtype=float)
    positive = np.array([[label] for _, label in rows])
    assert auroc(scores, positive)[0] == pytest.approx(roc_auc_score(positive, scores))
    expected = average_precision_score(positive, scores)
    assert average_precision(scores, positive)[0] == pytest.approx(expected)


@given(rows=BOTH, lost=st.integers(1, 5))
def test_a_text_without_a_score_does_not_count(rows, lost):
    scores = np.array([[score] for score, _ in rows], dtype=float)
    positive = np.array([[label] for _, label in rows])
    more = np.concatenate([scores, np.full((lost, 1), np.nan)])
    labels = np.concatenate([positive, np.ones((lost, 1), dtype=bool)])
    assert auroc(more, labels) == pytest.approx(auroc(scores, positive))
    assert average_precision(more, labels) == pytest.approx(average_precision(scores, positive))
    for whole, cut in zip(
        figures.auroc_intervals(scores, positive, draws=50, seed=1),
        figures.auroc_intervals(more, labels, draws=50, seed=1),
        strict=True,
    ):
        assert np.array_equal(whole, cut)


def test_each_direction_against_each_concept_is_auroc_of_every_pair():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, (40, 7)).astype(float), rng.random((40, 3)) < 0.3
    of_each = figures.auroc_of_each(scores, positive)
    for direction in range(7):
        repeated = np.repeat(scores[:, [direction]], 3, axis=1)
        assert of_each[direction] == pytest.approx(auroc(repeated, positive))


def test_the_interval_covers_the_true_auroc_as_often_as_it_says():
    shift, columns = 1.0, 400
    rng = np.random.default_rng(0)
    positive = np.zeros((150, columns), dtype=bool)
    positive[:30] = True
    scores = rng.normal(size=positive.shape) + shift * positive
    low, high = figures.auroc_intervals(scores, positive, draws=300, seed=0)
    true = scipy.stats.norm.cdf(shift / 2**0.5)
    assert 0.91 < ((low <= true) & (true <= high)).mean() < 0.98


def test_the_interval_is_that_of_resampling_texts_one_draw_at_a_time():
    rng = np.random.default_rng(1)
    positive = np.zeros((60, 1), dtype=bool)
    positive[:12] = True
    scores = rng.normal(size=(60, 1)) + positive
    low, high = figures.auroc_intervals(scores, positive, draws=4000, seed=0)
    plain = []
    for _ in range(2000):
        rows = np.concatenate([rng.integers(12, size=12), 12 + rng.integers(48, size=48)])
        plain.append(auroc(scores[rows], positive[rows])[0])
    assert [low[0], high[0]] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize("m, n", [(1, 9), (2, 60), (3, 7), (8, 40), (20, 30)])
def test_p_of_labels_is_the_exact_mann_whitney(m, n):
    rng = np.random.default_rng(m)
    for _ in range(5):
        positives, negatives = rng.normal(0.8, size=m), rng.normal(size=n)
        expected = scipy.stats.mannwhitneyu(
            positives, negatives, alternative="greater", method="exact"
        )
        value = np.array([expected.statistic / (m * n)])
        p = figures.p_of_labels(value, np.array([m]), m + n)
        assert p[0] == pytest.approx(expected.pvalue, rel=1e-6)


def test_p_of_labels_keeps_its_tail_at_the_size_of_a_corpus():
    highest = figures.p_of_labels(np.array([1.0, 0.0]), np.array([8, 8]), 2172)
    assert highest[0] == pytest.approx(1 / scipy.special.comb(2172, 8), rel=1e-6)
    assert highest[1] == pytest.approx(1)


def test_many_positives_go_by_the_normal_approximation():
    positives, negatives = np.random.default_rng(0).normal(size=(2, 60)) + [[0.4], [0]]
    found = scipy.stats.mannwhitneyu(positives, negatives, alternative="greater", method="exact")
    p = figures.p_of_labels(np.array([found.statistic / 3600]), np.array([60]), 120)
    assert p[0] == pytest.approx(found.pvalue, rel=0.05)


def test_adjusted_p_leaves_concepts_without_one_out():
    p = np.array([0.01, np.nan, 0.02, 0.5])
    assert figures.adjusted(p)[[0, 2, 3]] == pytest.approx([0.03, 0.03, 0.5])
    assert np.isnan(figures.adjusted(p)[1])


def test_accuracies_count_hits_among_the_highest():
    scores = np.eye(6)[[0, 1, 1, 5]] + 0.01 * np.arange(6)
    positive = np.eye(6, dtype=bool)[[0, 1, 2, 0]]
    clusters = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    figures_ = accuracies(scores, positive, clusters)
    assert (figures_["top1"], figures_["top5"], figures_["family"]) == (0.5, 0.75, 0.75)
    chances = [figures_[f"{name}_chance"] for name in ("top1", "top5", "family")]
    assert chances == pytest.approx([1 / 6, 5 / 6, 1 / 2])
    assert 0 < figures_["top1_low"] < 0.5 < figures_["top1_high"] < 1


def test_a_text_is_confused_with_the_cluster_of_the_concept_it_scores_highest_for():
    scores = np.eye(6)[[0, 1, 5, 5, 2]] + 0.01 * np.arange(6)
    scores[4] = np.nan
    positive = np.eye(6, dtype=bool)[[0, 2, 0, 4, 1]]
    positive[3, 0] = True  # of both clusters, and taken for the second
    clusters = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    assert confusion(scores, positive, clusters).tolist() == [[2, 1], [0, 1]]


# Splits


def test_all_texts_are_training_then_held_out_then_hard_each_once(planted):
    corpus, _ = planted
    again = dataclasses.replace(corpus, heldout=[*corpus.heldout, corpus.entries[0]])
    assert again.all_texts[: len(again.texts)] == again.texts
    after = [t.text for t in (*corpus.heldout, *corpus.hard_negatives)]
    assert again.all_texts[len(again.texts) :] == after


def test_every_training_text_is_tried_once_and_scenarios_stay_whole(planted):
    corpus, _ = planted
    (text, scenario), left_out = make_splits(corpus, ("text", "scenario"), 5, 0)
    assert not left_out
    assert sorted(text.rows) == list(range(len(corpus.texts)))
    for fold in (*text.folds, *scenario.folds):
        assert not set(fold.test) & set(fold.training.rows)
        assert [corpus.texts[row] for row in fold.training.rows] == fold.training.corpus.texts
    paired = {e.text: e.scenario for e in corpus.entries if e.scenario}
    assert {corpus.texts[row] for row in scenario.rows} == set(paired)
    for fold in scenario.folds:
        tried = {paired[corpus.texts[row]] for row in fold.test}
        trained = {paired.get(text) for text in fold.training.corpus.texts}
        assert not tried & trained


def test_folds_are_stratified():
    corpus = labelled(["calm"] * 10 + ["proud"] * 7 + [None] * 8)
    (split,), _ = make_splits(corpus, ("text",), 5, 0)
    for fold in split.folds:
        calm, proud = split.labels[fold.test].sum(0)
        assert (calm, len(fold.test)) == (2, 5) and proud in (1, 2)


def test_no_method_sees_a_text_that_it_is_tried_on(planted, register):
    corpus, acts = planted
    values = {tuple(row.tolist()): text for row, text in zip(acts[2], acts.texts, strict=True)}
    seen = []

    def spy(acts, corpus):
        assert not corpus.heldout and not corpus.hard_negatives
        assert [values[tuple(row.tolist())] for row in acts] == corpus.texts
        seen.append(set(corpus.texts))
        return torch.eye(len(corpus.concepts), HIDDEN)

    register("spy", spy)
    acts = dataclasses.replace(acts, layers=[2])
    for name in ("heldout", "text", "scenario"):
        seen.clear()
        quick(corpus, acts, "spy", splits=[name], repeats=0)
        (split,), _ = make_splits(corpus, [name], 5, 0)
        tried = [{corpus.all_texts[row] for row in fold.test} for fold in split.folds]
        everything, *trained = [seen[0], *(seen if name == "heldout" else seen[1:])]
        assert everything == set(corpus.texts)
        assert len(trained) == len(tried)
        assert not any(a & b for a, b in zip(trained, tried, strict=True))


def test_a_method_that_memorises_its_texts_is_found_out(register):
    corpus, acts = world(0.0, per_concept=8, hidden=128, seed=4)

    def memorise(acts, corpus):
        belongs = torch.stack([torch.zeros(len(acts)).index_fill(
            0, torch.from_numpy(corpus.positives(c)), 1.0) for c in corpus.concepts])  # fmt: skip
        return belongs @ torch.linalg.pinv(acts - acts.mean(0)).T

    register("memorise", memorise)
    leaky = extract(acts.select(corpus.texts), corpus, "memorise")
    labels = [next(e.concept for e in corpus.entries if e.text == text) for text in corpus.texts]
    assert separation(leaky, acts.select(corpus.texts), labels)[2].min() > 0.99
    summary = quick(corpus, acts, "memorise").summary
    assert summary["mean_auroc"].between(0.35, 0.65).all()


def test_scores_are_in_deviations_of_the_training_part_alone(planted):
    corpus, acts = planted
    everything = Part.of(corpus, np.arange(len(corpus.texts)))
    reader = Reader.at(2, "pooled", acts, acts[2], corpus.concepts, {})
    directions = extract(acts.select(corpus.texts), corpus)
    vectors = reader.fit(everything)
    assert torch.allclose(vectors, directions.vectors[2], atol=1e-6)
    last = np.array([len(acts.texts) - 1])
    z = (acts[2][-1] @ vectors.T - directions.means[2]) / directions.stds[2]
    assert reader.score(vectors, everything, last)[0] == pytest.approx(z.numpy(), abs=1e-4)


# Chance


@pytest.mark.parametrize("split", ["heldout", "text", "scenario"])
def test_of_pure_noise_at_most_one_concept_in_twenty_is_significant(split):
    shares, below = [], []
    for seed in range(20):
        corpus, acts = world(0.0, per_concept=8, seed=seed)
        table = quick(corpus, acts, splits=[split], repeats=0, seed=seed).concepts
        shares.append(table["significant"].mean())
        below.append((table[["p", "p_permutation"]].max(axis=1) < 0.05).mean())
    assert np.mean(shares) <= 0.05
    assert np.mean(below) <= 0.08


def test_the_nulls_contain_one_half(found):
    nulls = found.nulls
    assert set(nulls["kind"]) == {"random directions", "shuffled labels"}
    random = nulls[nulls["kind"] == "random directions"]
    assert len(random) == 2 * 3 and (random["method"] == "any").all()
    assert ((random["low"] < 0.5) & (random["high"] > 0.5)).all()
    shuffled = nulls[nulls["kind"] == "shuffled labels"]
    assert len(shuffled) == 2 * 2 * 3
    assert shuffled["mean"].between(0.3, 0.7).all()


# What was planted


def test_planted_directions_are_significant_and_recognised():
    names = [f"state {n}" for n in range(12)]
    found = quick(*world(concepts=names, per_concept=8), repeats=0)
    held = found.concepts[found.concepts["split"] != "scenario"]
    assert held["significant"].all() and held["auroc"].min() > 0.9
    summary = found.summary.set_index("split")
    assert summary.loc[["heldout", "text"], "top1"].min() > 0.8
    assert summary["top1_chance"].tolist() == pytest.approx([1 / 12] * 3)
    for name in ("median", "mean"):
        middle = summary[f"{name}_auroc"]
        assert middle.between(summary[f"{name}_low"], summary[f"{name}_high"]).all()
    assert set(summary["n_concepts"]) == {12}
    assert "told apart" not in str(found.recommend())


def test_embeddings_and_words_stand_beside_every_figure(found):
    pooled = found.concepts.query("method == 'pooled'").set_index(["layer", "split", "concept"])
    embedding = pooled.loc[-1]["auroc"]
    assert pooled.loc[2]["embedding_auroc"].equals(embedding.rename("embedding_auroc"))
    assert embedding.mean() < 0.7 < pooled.loc[2]["auroc"].mean()
    # Every text names its concept, and the words say so.
    assert pooled["words_auroc"].min() > 0.95
    assert found.summary[["embedding_top1", "words_top1"]].notna().all(axis=None)
    assert found.hard[["embedding_auroc", "words_auroc"]].notna().all(axis=None)


def test_without_the_embeddings_their_columns_are_empty():
    one = quick(*world(), repeats=0)
    assert one.concepts["embedding_auroc"].isna().all()
    assert not len(one.stability) and set(one.nulls["kind"]) == {"random directions"}


def test_words_are_learnt_from_the_training_part_only(planted):
    corpus, _ = planted
    rows = np.array([row for row, text in enumerate(corpus.texts) if "of calm" not in text])
    part, tried = Part.of(corpus, rows), np.array([0, 1, len(corpus.texts)])
    scores = Words(corpus.all_texts, corpus.concepts).score(part, tried)
    texts = [corpus.all_texts[row] for row in tried]
    # The same from a vectoriser that never sees another text.
    vectoriser = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"
    )
    known = vectoriser.fit_transform(part.corpus.texts).toarray()
    targets = membership(part.corpus).T.numpy()
    dual = np.linalg.solve(known @ known.T + np.eye(len(known)), targets - targets.mean(0))
    expected = vectoriser.transform(texts).toarray() @ known.T @ dual
    calm = corpus.concepts.index("calm")
    assert np.isnan(scores[:, calm]).all()
    assert np.delete(scores, calm, 1) == pytest.approx(expected, abs=1e-5)


def test_hard_negatives_that_project_as_high_are_shown_as_such(found):
    hard = found.hard.query("layer == 2").set_index(["method", "kind"])
    assert set(hard.index.get_level_values("kind")) == {"negated", "mentioned"}
    pooled = hard.loc["pooled"]
    assert (pooled["auroc"] < 0.5).all() and (pooled["ordinary_auroc"] > 0.95).all()
    assert (hard["auroc_low"] <= hard["auroc"]).all() and (
        hard["auroc"] <= hard["auroc_high"]
    ).all()
    assert set(hard["n_positives"]) == {24} and set(hard["n_hard"]) == {6}


def test_the_auroc_against_hard_negatives_is_over_all_pairs():
    corpus, acts = world(seed=3)
    row = quick(corpus, acts, splits=["heldout"], repeats=0).hard.set_index("kind").loc["negated"]
    directions = extract(acts.select(corpus.texts), corpus)
    values, place = text_means(acts, 2), {t: n for n, t in enumerate(acts.texts)}

    def z(text):
        column = directions.index(text.concept)
        projection = values[place[text.text]] @ directions.vectors[2][column]
        return ((projection - directions.means[2][column]) / directions.stds[2][column]).item()

    positives = [z(t) for t in corpus.heldout]
    negatives = [z(t) for t in corpus.hard_negatives if t.kind == "negated"]
    labels = [1] * len(positives) + [0] * len(negatives)
    assert row["auroc"] == pytest.approx(roc_auc_score(labels, positives + negatives))


def test_what_was_planted_is_more_stable_than_noise():
    strong = quick(*world(9.0), splits=["heldout"]).stability
    noise = quick(*world(0.0), splits=["heldout"]).stability
    assert strong["split_half"].min() > 0.5 > noise["split_half"].max()
    # A bootstrap shares texts with the whole, halves share none with each other.
    assert (strong["bootstrap"] > strong["split_half"]).all()


def test_a_concept_planted_along_another_is_its_twin():
    corpus, acts = world(4.0, heldout=4)
    stuck = {t.text for t in (*corpus.entries, *corpus.heldout) if t.concept == "stuck"}
    as_sad = extract(acts.select(corpus.texts), corpus).vectors[2][corpus.concepts.index("sad")]
    held = acts[2].clone()
    for row, text in enumerate(acts.texts):
        if text in stuck and text.startswith("direct"):
            held[row] += 12 * as_sad
    found = quick(corpus, dataclasses.replace(acts, _by_layer={2: held}), repeats=0)
    twins = found.twins(2)
    assert twins.loc["stuck", "twin"] == "sad" and twins.loc["stuck", "taken"] == 4
    assert len(twins.loc["stuck", "examples"]) == 3 and set(twins.loc["stuck", "examples"]) < stuck


def test_the_diagonal_of_the_cluster_confusion_is_the_family_accuracy(found):
    corpus, acts = world(strength=1.0)
    weak = quick(corpus, acts)
    for evaluation in (found, weak):
        for row in evaluation.summary.itertuples():
            counts = evaluation.cluster_confusion(row.layer, row.method, row.split)
            assert list(counts.index) == list(counts.columns)
            assert counts.to_numpy().sum() == row.n_tried
            assert np.trace(counts) / row.n_tried == pytest.approx(row.family)
    assert weak.summary.family.min() < 1


def test_without_a_manifest_there_are_no_clusters():
    corpus, acts = world()
    found = quick(dataclasses.replace(corpus, manifest={}), acts)
    assert found.cluster_confusion(2).empty


def test_the_recommendation_is_the_higher_median_with_its_margin(register):
    corpus, acts = world(2.0, layers=(-1, 1, 2), heldout=6)
    blurred = dataclasses.replace(
        acts, _by_layer={n: acts[n] + (0 if n == 2 else 4) * torch.randn_like(acts[n])
                         for n in acts.layers}
    )  # fmt: skip
    found = quick(corpus, blurred, splits=["heldout"], repeats=0)
    best = found.recommend()
    assert (best.method, best.layer, best.split, best.runner_up) == (
        "pooled", 2, "heldout", ("pooled", 1),
    )  # fmt: skip
    medians = found.summary.set_index("layer")["median_auroc"]
    assert best.margin == pytest.approx(medians[2] - medians[1])
    assert best.low <= best.margin <= best.high
    assert "pooled at layer 2" in str(best) and "layer 1" in str(best)


def test_a_method_that_covers_few_concepts_is_not_recommended_for_those(planted, register):
    def one_only(acts, corpus):
        rows = methods["pooled"].function(acts, corpus)
        rows[1:] = 0
        return rows

    register("one_only", one_only)
    found = quick(*planted, ["one_only", "pooled"], splits=["text"], repeats=0)
    best = found.recommend()
    assert (best.method, best.n_concepts, best.runner_up) == ("pooled", 6, ("one_only", 2))
    assert best.margin == pytest.approx(best.median_auroc - 0.5)


def test_where_all_texts_are_recognised_there_are_no_twins():
    found = quick(*world(60.0), splits=["heldout"], repeats=0)
    assert found.summary["top1"].item() == 1 and found.twins(2).empty


# Uneven corpora


def test_tokens_are_read_by_methods_that_read_them_and_averaged_for_others(register):
    corpus, acts = world()
    generator = torch.Generator().manual_seed(1)
    tokens = [row + torch.randn(3, HIDDEN, generator=generator) for row in acts[2]]
    tokens = [t - t.mean(0) + row for t, row in zip(tokens, acts[2], strict=True)]
    by_token = activations(corpus.all_texts, tokens)
    neutral = activations([f"neutral {n}" for n in range(9)], tokens[:9])
    names = ["pooled", "subspace", "centred"]
    found = quick(corpus, by_token, names, splits=["heldout"], repeats=0, neutral=neutral, top=2)
    assert list(found.summary["method"]) == names
    alone = quick(corpus, acts, splits=["heldout"], repeats=0)
    both = found.concepts.query("method == 'pooled'")["auroc"].to_numpy()
    assert both == pytest.approx(alone.concepts["auroc"].to_numpy())


def test_an_encoder_is_evaluated_as_a_model_that_writes_is(loaded, corpus):
    acts = capture(loaded("bert"), corpus.all_texts, [-1, 2], pool="mean", progress=False)
    found = quick(corpus, acts)
    assert found.provenance["model"] == "bert"
    assert found.concepts.auroc.notna().all()
    assert list(found.concepts.query("layer == 2").n_texts) == [len(corpus.texts)] * 3
    # Its embeddings have read no neighbours, so they are another reading than its layers.
    upper = found.concepts.query("layer == 2")
    assert (upper.auroc != upper.embedding_auroc).any()


def test_the_order_of_the_activations_does_not_matter():
    corpus, acts = world()
    order = torch.randperm(len(acts.texts), generator=torch.Generator().manual_seed(0))
    turned = dataclasses.replace(
        acts, texts=[acts.texts[i] for i in order], _by_layer={2: acts[2][order]}
    )
    assert quick(corpus, turned, repeats=0).concepts.equals(quick(corpus, acts, repeats=0).concepts)


def test_a_concept_without_texts_to_try_is_nan_and_does_not_count():
    corpus, acts = world()
    heldout = [t for t in corpus.heldout if t.concept != "calm"]
    corpus = dataclasses.replace(corpus, heldout=heldout)
    found = quick(corpus, acts, splits=["heldout"], repeats=0)
    row = found.concepts.set_index("concept").loc["calm"]
    assert row["n_positives"] == 0 and not row["significant"]
    assert row[["auroc", "auroc_low", "p", "p_adjusted", "average_precision"]].isna().all()
    assert found.summary["n_concepts"].item() == 5
    assert found.summary["significant"].item() == 1


def test_a_concept_that_a_method_has_no_direction_for_is_nan(planted, register):
    def lacking(acts, corpus):
        rows = methods["pooled"].function(acts, corpus)
        rows[corpus.concepts.index("proud")] = 0
        return rows

    register("lacking", lacking)
    found = quick(*planted, "lacking")
    assert found.concepts.set_index("concept").loc["proud", "auroc"].isna().all()
    assert (found.summary["n_concepts"] == 5).all()
    stability = found.stability.set_index("concept")["split_half"]
    assert stability["proud"].isna().all() and stability.drop("proud").notna().all()


def test_a_layer_at_which_all_texts_are_alike_has_no_figures_and_breaks_nothing():
    corpus, acts = world(layers=(-1, 2))
    acts = dataclasses.replace(acts, _by_layer={-1: torch.ones_like(acts[-1]), 2: acts[2]})
    found = quick(corpus, acts)
    assert found.concepts.query("layer == -1")["auroc"].isna().all()
    assert found.recommend().layer == 2


def test_splits_that_a_corpus_cannot_give_are_named():
    corpus = labelled(["calm", "proud"] * 4)
    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    found = quick(corpus, activations(corpus, values))
    assert list(found.summary["split"]) == ["text"]
    assert set(found.left_out) == {"heldout", "scenario"}
    assert found.summary["family"].isna().all() and not len(found.hard)


def test_the_same_seed_gives_the_same_figures(planted, found):
    again = quick(*planted, ["pooled", "linear"])
    for name in ("concepts", "summary", "hard", "stability", "nulls"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(again, name))


# The file


def test_an_evaluation_outlives_saving(found, tmp_path):
    path = found.save(tmp_path, notebook="07")
    loaded = Evaluation.load(tmp_path)
    for name in ("concepts", "summary", "hard", "stability", "nulls"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(loaded, name), rtol=1e-5)
    pd.testing.assert_frame_equal(found.twins(2), loaded.twins(2))
    assert loaded.recommend().layer == found.recommend().layer
    assert loaded.provenance["notebook"] == "07" and loaded.provenance["corpus_hash"]
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["folds"] == 5


def test_an_evaluation_without_hard_negatives_or_baselines_outlives_saving(tmp_path):
    corpus = labelled(["calm", "proud"] * 4)
    found = quick(corpus, activations(corpus, torch.randn(8, 4)), repeats=0)
    found.save(tmp_path)
    loaded = Evaluation.load(tmp_path)
    pd.testing.assert_frame_equal(found.concepts, loaded.concepts, rtol=1e-5)
    assert loaded.left_out == found.left_out


def test_a_fact_that_json_cannot_hold_leaves_the_old_file(found, tmp_path):
    before = found.save(tmp_path).read_text()
    with pytest.raises(ArtefactError):
        found.save(tmp_path, fact=object())
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == before


@pytest.mark.parametrize("content, said", [
    (None, "is not there"), ("{", "damaged"), ("{}", "lacks concepts"),
    ('{"concepts": {"auroc": [1]}, "summary": {}, "hard": {}, "stability": {}, "nulls": {},'
     '"mistaken": {}, "clusters": {}, "texts": {}, "left_out": {}}', "damaged"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_said_to_be_so(content, said, tmp_path):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ArtefactError, match=said):
        Evaluation.load(tmp_path)


# Bad input


def test_all_that_is_wrong_is_said_at_once(planted):
    corpus, acts = planted
    with pytest.raises(AmygdalaError) as caught:
        evaluate(
            acts.select(corpus.texts), corpus, ["poled", "centred"], splits=["texts"], folds=1,
            draws=0, repeats=-1, colour="red",
        )  # fmt: skip
    said = str(caught.value)
    for part in (
        "did you mean 'pooled'", "did you mean 'text'", "folds is 1", "draws is 0",
        "repeats is -1", "colour", "corpus.all_texts", "centred needs neutral",
    ):  # fmt: skip
        assert part in said


def test_methods_that_read_tokens_want_tokens(planted):
    with pytest.raises(AmygdalaError, match="pool='tokens'"):
        quick(*planted, "subspace")


def test_activations_that_are_not_finite_are_refused(planted):
    corpus, acts = planted
    held = {n: acts[n].clone() for n in acts.layers}
    held[2][3, 0] = torch.nan
    with pytest.raises(AmygdalaError, match="1 texts have activations that are not finite"):
        quick(corpus, dataclasses.replace(acts, _by_layer=held))


def test_a_corpus_that_can_give_none_of_the_splits_is_refused():
    corpus = labelled(["calm", "proud", "sad"])
    with pytest.raises(AmygdalaError, match="none of the splits"):
        quick(corpus, activations(corpus, torch.randn(3, 4)))


def test_what_was_not_evaluated_is_not_to_be_had(found):
    with pytest.raises(AmygdalaError, match="layer 7 was not evaluated"):
        found.twins(7)
    with pytest.raises(AmygdalaError, match="split 'voices' was not evaluated"):
        found.recommend("voices")


def test_a_method_of_the_wrong_shape_is_named(planted, register):
    register("flat", lambda acts, corpus: torch.zeros(2, 3))
    with pytest.raises(AmygdalaError, match="flat gave"):
        quick(*planted, "flat")
