"""Every method is its formula, finds what was planted, and says so when there is nothing."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import activations, labelled, made_of, plant

import amygdala_lib as amy
from amygdala_lib.corpus import Text
from amygdala_lib.directions import extract, membership, methods, subspace
from amygdala_lib.directions.subspace import top_eigenpairs
from amygdala_lib.errors import AmygdalaError, CorpusError

AGGREGATORS = ("mean", "pca", "logistic", "logistic_l1")
EXACT = 1 - 1e-5
CONCEPTS = ("calm", "afraid", "proud")


@pytest.fixture(scope="module")
def small():
    """Five concepts, six texts each in 24 dimensions, three tokens a text."""
    return plant(concepts=5, per_concept=6, hidden=24, nuisances=2, noise=0.3, tokens=3)


def run(planted, method, **options):
    held = planted.tokens if methods[method].reads_tokens else planted.texts
    if method == "centred":
        neutral = activations([f"{i}" for i in range(len(planted.neutral))], planted.neutral)
        options = {"neutral": neutral} | options
    return extract(activations(planted.corpus, held), planted.corpus, method, **options)


def rows_of(corpus):
    """For each concept the rows of its texts and of all others, found without `positives`."""
    labels = np.array(
        [next(e.concept for e in corpus.entries if e.text == t) for t in corpus.texts]
    )
    return [(np.flatnonzero(labels == c), np.flatnonzero(labels != c)) for c in corpus.concepts]


def cosines(found, expected):
    found, expected = found.double(), torch.as_tensor(np.asarray(expected))
    return torch.cosine_similarity(found, expected)


# Against the formula in float64


def test_centred_is_its_formula(small):
    texts, neutral = small.texts.double().numpy(), small.neutral.double().numpy()
    means = np.stack([texts[positives].mean(0) for positives, _ in rows_of(small.corpus)])
    covariance = np.cov(neutral.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(np.argmax(np.cumsum(values) / values.sum() >= 0.5)) + 1
    kept = np.eye(24) - vectors[:, :count] @ vectors[:, :count].T
    expected = (means - means.mean(0)) @ kept
    assert cosines(run(small, "centred").vectors[2], expected).min() > EXACT


def test_paired_is_its_formula(small):
    texts = small.texts.double().numpy()
    row_of = {text: row for row, text in enumerate(small.corpus.texts)}
    per_concept = []
    for concept in small.corpus.concepts:
        differences = []
        for entry in (e for e in small.corpus.entries if e.concept == concept):
            same = [row_of[e.text] for e in small.corpus.entries if e.scenario == entry.scenario]
            differences.append(texts[row_of[entry.text]] - texts[same].mean(0))
        per_concept.append(np.mean(differences, 0))
    expected = np.array(per_concept) - np.mean(per_concept, 0)
    assert cosines(run(small, "paired").vectors[2], expected).min() > EXACT


def test_paired_leaves_out_baselines_and_compares_versions_with_one_another():
    entries = [
        Text("home, calm", "paired", "calm", "home", 0, "here"),
        Text("home, afraid", "paired", "afraid", "home", 0, "here"),
        Text("home again, calm", "paired", "calm", "home", 1, "here"),
        Text("home again, afraid", "paired", "afraid", "home", 1, "here"),
        Text("home", "paired", None, "home", 0, "here"),
        Text("a story", "story", "calm", None, None, "here"),
    ]
    values = torch.tensor([[1.0, 0, 9, 0], [0, 1, 9, 0], [1, 0, 0, 7], [0, 1, 0, 7],
                           [50, 0, 0, 0], [0, 0, 30, 0]])  # fmt: skip
    corpus = made_of(entries)
    found = extract(activations(corpus, values), corpus, "paired").vectors[2]
    expected = torch.tensor([[-1.0, 1, 0, 0], [1, -1, 0, 0]]) / 2**0.5
    assert torch.allclose(found, expected, atol=1e-6)


def test_linear_is_the_shortest_least_squares_fit(small):
    texts = small.texts.double().numpy()
    centred = texts - texts.mean(0)
    expected = []
    for positives, _ in rows_of(small.corpus):
        target = -np.ones(len(texts))
        target[positives] = 1
        expected.append(np.linalg.lstsq(centred, target - target.mean(), rcond=1e-6)[0])
    assert cosines(run(small, "linear").vectors[2], expected).min() > EXACT


def projectors(planted):
    spans = []
    for tokens in planted.tokens:
        rows = np.linalg.svd(tokens.double().numpy(), full_matrices=False)[2]
        spans.append(rows.T @ rows)
    return np.stack(spans)


def test_subspace_is_its_formula(small):
    spans = projectors(small)
    means = np.stack([tokens.double().mean(0).numpy() for tokens in small.tokens])
    expected, spectra = [], []
    for positives, negatives in rows_of(small.corpus):
        values, vectors = np.linalg.eigh(spans[positives].mean(0) - spans[negatives].mean(0))
        values, vectors = values[::-1], vectors[:, ::-1][:, :5]
        gap = (means[positives].mean(0) - means[negatives].mean(0)) @ vectors
        expected.append((vectors * np.sign(gap)) @ np.clip(values[:5], 0, None))
        spectra.append(values[:20])
    found = run(small, "subspace")
    assert cosines(found.vectors[2], expected).min() > EXACT
    assert np.abs(found.eigenvalues[2].numpy() - np.array(spectra)).max() < 1e-5


def test_subspace_options_choose_how_much_of_a_text_and_how_many_directions(small):
    whole = run(small, "subspace").vectors[2]
    for options in ({"top": 1}, {"rank": 1}):
        assert cosines(run(small, "subspace", **options).vectors[2], whole).max() < EXACT
    one = run(small, "subspace", rank=1, top=1)
    assert one.provenance["parameters"] == {"top": 1, "rank": 1, "seed": 0}


def test_repeated_tokens_span_no_more_than_one(small):
    """At the embeddings, where the same word has the same vector each time."""
    twice = dataclasses.replace(small, tokens=[torch.cat([t, t]) for t in small.tokens])
    once, again = run(small, "subspace"), run(twice, "subspace")
    assert torch.allclose(once.eigenvalues[2], again.eigenvalues[2], atol=1e-5)


# Against steering-vectors


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("steering_vectors", reason="see requirements-nodeps.txt").aggregators


@pytest.fixture(scope="module")
def halves():
    """Two concepts with as many texts each: every text is in a pair, in order."""
    values = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)) + 5
    values[:12, 0] += 2
    return labelled(["calm"] * 12 + ["afraid"] * 12), values


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_are_those_of_steering_vectors(library, halves, name):
    corpus, values = halves
    aggregator = {
        "mean": library.mean_aggregator(),
        "pca": library.pca_aggregator(),
        "logistic": library.logistic_aggregator(),
        "logistic_l1": library.logistic_aggregator(
            {"l1_ratio": 1.0, "solver": "liblinear", "random_state": 0}
        ),
    }[name]
    # They leave the mean of all texts in, which liblinear's penalised fit is not blind to.
    expected = aggregator(values[:12] - values.mean(0), values[12:] - values.mean(0))
    found = extract(activations(corpus, values), corpus, name)
    assert cosines(found.vectors[2][[1]], expected[None]) > EXACT
    # On pairs as they are: centring has changed none of the differences.
    if name in ("mean", "pca"):
        plain = aggregator(values[:12], values[12:])
        assert cosines(found.vectors[2][[1]], plain[None]) > EXACT


def test_pca_is_the_leading_direction_of_the_differences_both_ways(library, halves):
    corpus, values = halves
    differences = (values[:12] - values[12:]).double().numpy()
    expected = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    found = extract(activations(corpus, values), corpus, "pca").vectors[2][[1]]
    assert cosines(found, expected[None]).abs() > EXACT


def test_logistic_is_the_regularised_fit_in_float64(library, halves):
    corpus, values = halves
    x = values.double().numpy() - values.double().numpy().mean(0)
    # The aggregator centres each pair on its own mean, so both members differ by sign alone.
    half = (x[:12] - x[12:]) / 2
    rows, signs = np.concatenate([half, -half]), np.array([1] * 12 + [-1] * 12)

    def loss(w):
        return 0.5 * w @ w + np.logaddexp(0, -signs * (rows @ w)).sum()

    best = scipy.optimize.minimize(loss, np.zeros(16), tol=1e-10).x
    found = extract(activations(corpus, values), corpus, "logistic").vectors[2][[1]]
    assert cosines(found, best[None]) > 1 - 1e-4


@pytest.mark.parametrize("name", AGGREGATORS)
def test_unequal_numbers_are_sampled_with_the_seed(library, name):
    labels = ["calm"] * 9 + ["afraid"] * 4 + [None] * 30
    corpus = labelled(labels)
    values = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(1))
    values[:9] += 0.5
    acts = activations(corpus, values)
    first, again, other = (extract(acts, corpus, name, seed=s).vectors[2] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_another_concept_leaves_the_draws_of_the_others_as_they_were(library):
    labels = ["calm"] * 4 + ["afraid"] * 4 + ["zealous"] * 30
    values = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(1))
    both = labelled([label if label != "zealous" else None for label in labels])
    three = labelled(labels)
    found = [extract(activations(c, values), c, "mean").vectors[2][:2] for c in (both, three)]
    assert torch.equal(*found)


# What every method does


ALL = sorted(methods)


def test_there_are_the_methods_that_the_documentation_names():
    assert set(ALL) == {
        "pooled", "centred", "paired", "subspace", "pca", "mean", "logistic", "logistic_l1",
        "linear",
    }  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_positives_project_higher(small, name):
    found = run(small, name).vectors[2]
    projections = small.texts @ found.T
    belongs = membership(small.corpus).bool()
    for column, row in enumerate(belongs):
        assert projections[row, column].mean() > projections[~row, column].mean()


@pytest.mark.parametrize("name", ALL)
def test_two_runs_give_the_same_bytes(small, name, tmp_path):
    for folder in ("one", "two"):
        run(small, name).save(tmp_path / folder)
    for file in ("readout.safetensors", "readout.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert amy.Directions.load(tmp_path / "one").provenance["method"] == name


def test_methods_that_look_past_the_content_recover_what_was_planted():
    """95 concepts, 20 texts each, content five times stronger than any concept."""
    planted = plant()
    # A concept is known only up to what all of them share.
    truth = planted.directions - planted.directions.mean(0)

    def recovered(name, **options):
        return cosines(run(planted, name, **options).vectors[2], truth).median()

    assert recovered("paired") > 0.9
    assert recovered("linear") > 0.8 and recovered("logistic") > 0.8
    # Half of the neutral variance is half of the content's directions.
    assert recovered("pooled") < recovered("centred") < recovered("centred", variance=0.99)
    assert recovered("centred", variance=0.99) > 0.85


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_directions_do_not_depend_on_the_scale_of_the_activations(seed, scale):
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    corpus = labelled(["calm", "afraid", "proud"] * 4)
    for name in ("pooled", "linear"):
        plain = extract(activations(corpus, values), corpus, name).vectors[2]
        scaled = extract(activations(corpus, values * scale), corpus, name).vectors[2]
        assert torch.allclose(plain, scaled, atol=1e-3)


# Eigenvalues


@given(
    hidden=st.integers(2, 90), rank=st.integers(1, 90), count=st.integers(1, 25),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_top_of_any_spectrum_is_found(hidden, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(hidden, min(rank, hidden), generator=generator)
    matrix = factor @ factor.T / hidden - 0.5 * torch.eye(hidden) * (seed % 2)
    expected = torch.linalg.eigvalsh(matrix.double()).flip(0)[:count]
    values, vectors = top_eigenpairs(lambda block: matrix @ block, hidden, count, like=matrix)
    assert len(values) == min(count, hidden)
    assert (values - expected).abs().max() < 1e-3 * expected.abs().max().clamp(min=1)
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(values)), atol=1e-4)


def test_an_operator_that_is_nothing_has_eigenvalues_of_zero():
    values, _ = top_eigenpairs(torch.zeros_like, 30, 4, like=torch.zeros(1))
    assert torch.equal(values, torch.zeros(4))


def test_a_flat_spectrum_is_solved_to_the_tolerance():
    """Neighbouring eigenvalues a thousandth apart, as wide as a real residual stream."""
    diagonal = torch.linspace(1, 0, 1000)
    values, _ = top_eigenpairs(lambda b: diagonal[:, None] * b, 1000, 20, like=diagonal)
    assert ((values - diagonal[:20]) / diagonal[:20]).abs().max() < 1e-4


# What can be wrong


def test_a_concept_without_scenarios_is_named_and_the_others_come_out(small):
    extra = [Text(f"more {i}", "story", "smug", None, None, "here") for i in range(3)]
    corpus = made_of([*small.corpus.entries, *extra])
    values = torch.cat([small.texts, torch.randn(3, 24)])
    with pytest.warns(UserWarning, match="no direction at layer 2 for smug: paired finds"):
        found = extract(activations(corpus, values), corpus, "paired")
    assert found.concepts == small.corpus.concepts


def test_a_text_that_is_not_finite_is_named_and_left_out(small):
    broken = small.texts.clone()
    broken[3, 5], broken[7, 1] = torch.nan, torch.inf
    kept = [text for row, text in enumerate(small.corpus.texts) if row not in (3, 7)]
    lost = [e.concept for e in small.corpus.entries if e.text not in kept]
    with pytest.warns(UserWarning, match=f"left out 2 texts.*{lost[0]}: .*wider dtype"):
        found = extract(activations(small.corpus, broken), small.corpus)
    expected = extract(activations(small.corpus, small.texts).select(kept), small.corpus.only(kept))
    assert torch.equal(found.vectors[2], expected.vectors[2])


def test_a_concept_left_without_texts_is_named_and_the_others_come_out():
    corpus = labelled(["calm", "calm", "afraid", None, None])
    values = torch.randn(5, 8)
    values[2] = torch.nan
    with pytest.warns(UserWarning) as warned:
        found = extract(activations(corpus, values), corpus)
    assert found.concepts == ["calm"]
    assert "afraid" in "".join(str(w.message) for w in warned)


def test_nothing_finite_is_an_error():
    corpus = labelled(["calm", "calm", "afraid"])
    values = torch.full((3, 8), torch.nan)
    with pytest.warns(UserWarning, match="left out 3"), pytest.raises(CorpusError, match="too few"):
        extract(activations(corpus, values), corpus)


@pytest.mark.parametrize("name", ALL)
def test_a_concept_with_one_text_comes_out_too(name):
    entries = [
        Text(f"{scenario} {concept}", "paired", concept, scenario, 0, "here")
        for scenario in "abcd"
        for concept in (CONCEPTS if scenario == "a" else CONCEPTS[:2])
    ]
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(len(entries), 16, generator=generator)
    texts[2] += 3  # far enough for a penalised fit on one pair to see it
    planted = dataclasses.replace(
        plant(concepts=5, per_concept=1, hidden=16),
        corpus=made_of(entries),
        texts=texts,
        tokens=[text + torch.randn(3, 16, generator=generator) for text in texts],
    )
    assert "proud" in run(planted, name).concepts


def test_an_unknown_or_missing_option_is_named_with_those_there_are(small):
    acts = activations(small.corpus, small.texts)
    with pytest.raises(AmygdalaError, match="pca has no option sed .options: seed"):
        extract(acts, small.corpus, "pca", sed=1)
    with pytest.raises(
        AmygdalaError, match=r"centred needs neutral: .*capture\(lm, corpus.neutral"
    ):
        extract(acts, small.corpus, "centred")


@pytest.mark.parametrize("changes", [{"model_hash": "1"}, {"pool": "mean"}, {"layers": [1]}])
def test_neutral_activations_of_something_else_are_refused(small, changes):
    neutral = activations(["n"], small.neutral[:1], **changes)
    with pytest.raises(AmygdalaError, match="neutral was captured from other weights, or with"):
        extract(activations(small.corpus, small.texts), small.corpus, "centred", neutral=neutral)


def test_each_method_says_which_pool_it_reads(small):
    with pytest.raises(AmygdalaError, match="subspace reads every token.*pool='tokens'"):
        extract(activations(small.corpus, small.texts), small.corpus, "subspace")
    with pytest.raises(AmygdalaError, match="linear reads one vector per text"):
        extract(activations(small.corpus, small.tokens), small.corpus, "linear")


def test_a_method_with_eigenvalues_keeps_them_through_saving_and_selecting(small, tmp_path):
    found = run(small, "subspace")
    loaded = amy.Directions.load(found.save(tmp_path))
    assert torch.equal(loaded.eigenvalues[2], found.eigenvalues[2])
    one = found.select(["concept_003"], [2])
    assert one.concepts == ["concept_003"]
    assert torch.equal(one.vectors[2][0], found.vectors[2][3])
    assert torch.equal(one.eigenvalues[2][0], found.eigenvalues[2][3])
    with pytest.raises(AmygdalaError, match=r"no directions at layers \[3\]: there are \[2\]"):
        found.select(layers=[3])
    with pytest.raises(AmygdalaError, match="no direction for 'concept_3'"):
        found.select(["concept_3"])


def test_a_method_written_by_somebody_else_takes_options_as_well(small):
    @amy.directions.method("top_texts")
    def top_texts(acts, corpus, *, count: int = 2):
        return torch.stack([acts[corpus.positives(c)[:count]].mean(0) for c in corpus.concepts])

    try:
        found = extract(activations(small.corpus, small.texts), small.corpus, "top_texts", count=3)
    finally:
        del methods["top_texts"]
    assert found.provenance["parameters"] == {"count": 3}
    assert subspace is methods["subspace"].function
