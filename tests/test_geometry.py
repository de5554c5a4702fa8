"""The space of concepts is measured as scikit-learn would, and a planted axis is found."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from amygdala_lib import Directions, capture, extract
from amygdala_lib.errors import AmygdalaError
from amygdala_lib.geometry import affect_geometry, cross_validated_r, layer_likeness

HIDDEN = 24


def made(*vectors):
    """Directions at layers 0, 1, ... of these rows, made unit."""
    units = {
        i: torch.nn.functional.normalize(torch.as_tensor(v).float()) for i, v in enumerate(vectors)
    }
    n = len(vectors[0])
    return Directions(
        concepts=[f"c{i}" for i in range(n)],
        vectors=units,
        residual_norms=dict.fromkeys(units, 1.0),
        means={i: torch.zeros(n) for i in units},
        stds={i: torch.ones(n) for i in units},
    )


def random(n=30, seed=0, layers=1):
    rng = np.random.default_rng(seed)
    return made(*rng.normal(size=(layers, n, HIDDEN)))


def rated(directions, **columns):
    return pd.DataFrame(columns, index=directions.concepts)


def planted(n=60, noise=0.3, seed=0):
    """Valence along one axis, weaker arousal along another, and noise in all."""
    rng = np.random.default_rng(seed)
    valence, arousal = rng.uniform(-1, 1, size=(2, n))
    vectors = noise * rng.normal(size=(n, HIDDEN)) / np.sqrt(HIDDEN)
    vectors[:, 0] += 1
    vectors[:, 1] += valence
    vectors[:, 2] += 0.6 * arousal
    directions = made(vectors)
    return directions, rated(directions, valence=valence, arousal=arousal)


def test_the_components_and_correlations_are_those_of_scikit_learn_and_scipy():
    directions = random()
    ratings = rated(directions, valence=np.random.default_rng(1).normal(size=30))
    found = affect_geometry(directions, 0, ratings, components=4, draws=10)
    pca = PCA(svd_solver="full").fit(directions.vectors[0].double().numpy())
    scores = pca.transform(directions.vectors[0].double().numpy())
    assert found["component"].tolist() == [1, 2, 3, 4]
    assert np.allclose(found["share"], pca.explained_variance_ratio_[:4])
    for row in found.itertuples():
        score = scores[:, row.component - 1]
        r = np.corrcoef(score, ratings["valence"])[0, 1]
        assert np.isclose(row.pearson, abs(r))
        rho = spearmanr(score, ratings["valence"]).statistic
        assert np.isclose(row.spearman, rho * np.sign(r))
        assert row.n == 30


def test_a_planted_valence_axis_is_the_first_component_and_arousal_the_second():
    directions, ratings = planted()
    found = affect_geometry(directions, 0, ratings).set_index(["component", "rating"])
    assert found.loc[(1, "valence"), "pearson"] > 0.95
    assert found.loc[(2, "arousal"), "pearson"] > 0.9
    assert abs(found.loc[(1, "arousal"), "pearson"]) < 0.4
    assert found["share"].xs("valence", level="rating").is_monotonic_decreasing
    r = cross_validated_r(directions, 0, ratings)
    assert (r["r"] > 0.9).all()
    assert (r["r_low"] < r["r"]).all() and (r["r"] < r["r_high"]).all()


def test_the_largest_correlation_of_each_component_is_positive_whatever_the_ratings_sign():
    directions, ratings = planted()
    for sign in (1, -1):
        found = affect_geometry(directions, 0, sign * ratings, draws=10)
        for _, rows in found.groupby("component"):
            assert rows.loc[rows["pearson"].abs().idxmax(), "pearson"] > 0


def test_an_interval_is_the_percentiles_of_resampled_concepts_and_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        latent, noise = rng.normal(size=(2, 60))
        vectors = 1e-4 * rng.normal(size=(60, HIDDEN))
        vectors[:, 0] += 1
        vectors[:, 1] += 0.1 * latent
        directions = made(vectors)
        ratings = rated(directions, valence=0.6 * latent + 0.8 * noise)  # r = 0.6
        row = affect_geometry(directions, 0, ratings, components=1, draws=400, seed=seed).iloc[0]
        assert row.pearson_low < row.pearson < row.pearson_high
        covered += row.pearson_low <= 0.6 <= row.pearson_high
    assert covered >= 34


def test_unrated_concepts_count_for_the_components_and_not_for_the_correlations():
    directions, ratings = planted()
    gaps = ratings.copy()
    gaps.loc["c0":"c9", "arousal"] = np.nan
    gaps = gaps.drop("c20")
    whole = affect_geometry(directions, 0, ratings, draws=10)
    found = affect_geometry(directions, 0, gaps.assign(word="as match_norms has it"), draws=10)
    assert found["share"].equals(whole["share"])
    assert found.set_index("rating").loc["valence", "n"].unique().tolist() == [59]
    assert found.set_index("rating").loc["arousal", "n"].unique().tolist() == [49]
    kept = affect_geometry(directions, 0, ratings, draws=10)["pearson"]
    assert not np.allclose(found["pearson"], kept)
    assert cross_validated_r(directions, 0, gaps)["n"].tolist() == [59, 49]


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_left_out_predictions_are_those_of_a_refit_for_every_concept(penalty):
    directions = random(n=20)
    vectors = directions.vectors[0].double().numpy()
    y = vectors[:, 0] + 0.1 * np.random.default_rng(2).normal(size=20)
    unit = ((vectors - vectors.mean(0)) ** 2).sum(1).mean()
    refitted = cross_val_predict(Ridge(alpha=penalty * unit), vectors, y, cv=LeaveOneOut())
    found = cross_validated_r(directions, 0, rated(directions, valence=y), penalty=penalty)
    assert np.isclose(found.loc["valence", "r"], np.corrcoef(refitted, y)[0, 1])


def test_vectors_that_say_nothing_of_the_ratings_predict_nothing():
    rs = []
    for seed in range(20):
        directions = random(n=50, seed=seed)
        noise = np.random.default_rng(1000 + seed).normal(size=50)
        rs.append(cross_validated_r(directions, 0, rated(directions, valence=noise), draws=50)["r"])
    assert -0.4 < np.mean(rs) < 0.05


def test_the_same_seed_gives_the_same_figures():
    directions, ratings = planted(n=20)
    for measure in (affect_geometry, cross_validated_r):
        one, two = (measure(directions, 0, ratings, draws=50, seed=3) for _ in range(2))
        pd.testing.assert_frame_equal(one, two)
        assert not measure(directions, 0, ratings, draws=50, seed=4).equals(one)


def test_layers_are_alike_as_the_ranks_of_their_cosines_are():
    directions = random(n=12, layers=3)
    table = layer_likeness(directions)
    assert table.index.tolist() == table.columns.tolist() == [0, 1, 2]
    above = np.triu_indices(12, k=1)
    one, two = (directions.similarity(layer).numpy()[above] for layer in (0, 2))
    assert np.isclose(table.loc[0, 2], spearmanr(one, two).statistic)
    assert np.allclose(np.diag(table), 1) and np.allclose(table, table.T)


def test_a_turned_copy_of_a_layer_holds_the_same_arrangement():
    vectors = np.random.default_rng(0).normal(size=(10, HIDDEN))
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(HIDDEN, HIDDEN)))[0]
    assert layer_likeness(made(vectors, vectors @ turn)).loc[0, 1] > 0.999


def test_the_directions_of_a_real_model_are_measured(lm, corpus):
    acts = capture(lm, corpus, [0, 2], pool="mean", progress=False)
    directions = extract(acts, corpus)
    ratings = pd.DataFrame({"valence": [0.8, -0.7, 0.6]}, index=["calm", "afraid", "proud"])
    found = affect_geometry(directions, 2, ratings, draws=50)
    assert found["component"].tolist() == [1, 2]  # three concepts have no more
    assert np.isclose(found["share"].sum(), 1)
    assert np.isclose(layer_likeness(directions).loc[0, 0], 1)


def test_all_that_is_wrong_is_said_at_once():
    directions = random()
    ratings = rated(directions, valence=1.0, arousal=np.nan)
    ratings.loc["c0", "arousal"] = 1
    with pytest.raises(AmygdalaError) as error:
        affect_geometry(directions, 7, ratings, components=0, draws=0)
    said = str(error.value)
    assert "no directions at layer 7: there are [0]" in said
    assert "components is 0" in said and "draws is 0" in said
    assert "all ratings of valence are 1: nothing can correlate" in said
    assert "1 of 30 concepts have a rating of arousal" in said


def test_unusable_ratings_are_refused():
    directions = random()
    values = np.arange(30.0)
    twice = rated(directions, valence=values)
    twice.index = ["c1", *directions.concepts[1:]]
    with pytest.raises(AmygdalaError, match="several rows for c1"):
        affect_geometry(directions, 0, twice)
    with pytest.raises(AmygdalaError, match=r"no numeric column \(there are: word\)"):
        cross_validated_r(directions, 0, rated(directions, word="calm"))
    with pytest.raises(AmygdalaError, match="0 of 30 concepts.*names of concepts"):
        affect_geometry(directions, 0, pd.DataFrame({"valence": values}))
    with pytest.raises(AmygdalaError, match="ratings of valence are infinite for c29"):
        affect_geometry(directions, 0, rated(directions, valence=[*values[:-1], np.inf]))
    with pytest.raises(AmygdalaError, match="penalty is 0"):
        cross_validated_r(directions, 0, rated(directions, valence=values), penalty=0)


def test_too_few_concepts_have_no_arrangement():
    with pytest.raises(AmygdalaError, match="2 concepts have too few pairs"):
        layer_likeness(random(n=2))
