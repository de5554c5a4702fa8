"""Every figure of the quality report against a plain computation, and the right bucket."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import activations, labelled
from sklearn.linear_model import Ridge

import amygdala_lib as amy
from amygdala_lib import capture, extract, quality_report
from amygdala_lib.components import find_output
from amygdala_lib.directions import membership
from amygdala_lib.errors import AmygdalaError, ArtefactError
from amygdala_lib.quality import (
    agreement,
    alignment,
    combinations,
    head_differences,
    head_effects,
    nearest,
    neighbour_r2,
    neuron_contributions,
    neuron_cosines,
)


def units(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


# Geometry


@given(n=st.integers(2, 20), hidden=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_combinations_are_a_ridge_on_all_other_directions(n, hidden, seed):
    vectors = units(n, hidden, seed=seed)
    r2, weights = combinations(vectors)
    exact = vectors.double().numpy()
    for row in range(n):
        others = np.delete(exact, row, 0)
        fit = Ridge(alpha=0.01, fit_intercept=False).fit(others.T, exact[row])
        assert np.abs(np.delete(weights[row].numpy(), row) - fit.coef_).max() < 1e-3
        residual = exact[row] - others.T @ fit.coef_
        assert r2[row] == pytest.approx(1 - residual @ residual, abs=1e-4)
        assert weights[row, row] == 0


def test_neighbours_explain_a_mixture_of_them_and_nothing_else():
    vectors = units(40, 200)
    vectors[3] = torch.nn.functional.normalize(vectors[1] + vectors[2], dim=0)
    rows, cosines = nearest(vectors)
    assert rows.shape == cosines.shape == (40, 5)
    assert set(rows[3, :2].tolist()) == {1, 2}
    assert cosines[3, 0] == pytest.approx(float((vectors @ vectors[3]).topk(2).values[1]), abs=1e-6)
    found = neighbour_r2(vectors, rows)
    assert found[3] > 0.99
    assert found[10:].max() < 0.4
    expected = np.linalg.lstsq(vectors[rows[7]].T.numpy(), vectors[7].numpy(), rcond=None)[1]
    assert found[7] == pytest.approx(1 - expected[0], abs=1e-4)


def test_directions_against_all_others_add_up_but_are_not_redundant():
    """With shared negatives, differences of means sum to zero: each is minus all the others."""
    corpus = labelled([f"concept {i % 12}" for i in range(120)])
    values = 3 * units(12, 64)[torch.arange(120) % 12] + 0.1 * torch.randn(120, 64)
    vectors = extract(activations(corpus, values), corpus).vectors[2]
    assert combinations(vectors)[0].min() > 0.9
    assert neighbour_r2(vectors, nearest(vectors)[0]).max() < 0.7


# Texts


def test_agreement_is_the_mean_cosine_of_pairs_and_beats_chance_where_there_is_something():
    generator = torch.Generator().manual_seed(0)
    labels = ["real"] * 8 + ["made up"] * 8 + ["single"] + [None] * 60
    corpus = labelled(labels)
    values = torch.randn(len(labels), 32, generator=generator) + 7
    values[:8, 0] += 4
    found = agreement(values, membership(corpus))
    centred = values - values.mean(0)
    for row, concept in enumerate(corpus.concepts):
        chosen = centred[corpus.positives(concept)]
        table = torch.cosine_similarity(chosen[:, None], chosen[None], dim=2)
        n = len(chosen)
        if n > 1:
            expected = (table.sum() - n) / (n * (n - 1))
            assert found.cosine[row] == pytest.approx(float(expected), abs=1e-5)
    by_name = dict(zip(corpus.concepts, zip(*found, strict=True), strict=True))
    assert by_name["real"][0] > by_name["real"][1]
    assert by_name["made up"][0] < by_name["made up"][1]
    assert by_name["single"][0].isnan() and by_name["single"][2] == 0
    r = float(by_name["real"][0])
    assert by_name["real"][2] == pytest.approx(8 * r / (1 + 7 * r), abs=1e-5)
    n = float(by_name["real"][3])
    assert n * r / (1 + (n - 1) * r) == pytest.approx(0.8, abs=1e-4)


def test_reliability_is_how_well_new_texts_would_give_the_same_direction():
    """Against directions made of other texts of the same kind, many times over."""
    generator = torch.Generator().manual_seed(2)
    kinds, n, hidden = 30, 6, 50
    truth = torch.nn.functional.normalize(torch.randn(kinds, hidden, generator=generator), dim=1)
    corpus = labelled([f"kind {i % kinds:02d}" for i in range(kinds * n)])
    rows = torch.arange(kinds * n) % kinds
    values = 4 * truth[rows] + torch.randn(kinds * n, hidden, generator=generator)
    said = agreement(values, membership(corpus)).reliability.mean()
    found = extract(activations(corpus, values), corpus).vectors[2]
    reached = torch.cosine_similarity(found, truth - truth.mean(0)).square().mean()
    assert said == pytest.approx(float(reached), abs=0.06)


def test_alignment_finds_the_stray_text():
    values = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * 0.3
    values[:6, 0] += 3
    values[2, 0] -= 6
    chosen = torch.zeros(30)
    chosen[:6] = 1
    found = alignment(values, chosen, torch.eye(20)[0])
    assert int(found.argmin()) == 2 and found[2] < -0.5 and found[[0, 1, 3, 4, 5]].min() > 0.8


# Heads and neurons, on real models


@pytest.fixture
def read(any_lm, corpus):
    def at(site):
        return capture(any_lm, corpus, [1, 3], pool="mean", site=site, progress=False)

    return at


def test_heads_add_up_to_what_the_attention_output_does_along_a_direction(any_lm, corpus, read):
    heads, belongs = read("attn_heads"), membership(corpus)
    vectors = units(3, 64)
    for layer in (1, 3):
        output = find_output(any_lm, layer, "attn_heads")
        effects = head_effects(heads[layer], output, vectors, belongs)
        assert effects.shape == (3, 4)
        written = heads[layer].double() @ output.weight.double().T
        for row, concept in enumerate(corpus.concepts):
            positives, negatives = corpus.positives(concept), corpus.negatives(concept)
            whole = (written[positives].mean(0) - written[negatives].mean(0)) @ vectors[
                row
            ].double()
            assert effects[row].sum() == pytest.approx(float(whole), rel=1e-3, abs=1e-5)


def test_head_norms_and_selectivity_are_their_definitions(lm, corpus):
    heads = capture(lm, corpus, [3], pool="mean", site="attn_heads", progress=False)[3]
    norms, selectivity = head_differences(heads, 4, membership(corpus))
    parts = heads.double().numpy().reshape(len(heads), 4, -1)
    for row, concept in enumerate(corpus.concepts):
        positives, negatives = parts[corpus.positives(concept)], parts[corpus.negatives(concept)]
        expected = np.linalg.norm(positives.mean(0) - negatives.mean(0), axis=1)
        spread = np.sqrt(negatives.var(0).sum(1))
        assert np.allclose(norms[row].numpy(), expected, rtol=1e-3)
        assert np.allclose(selectivity[row].numpy(), expected / spread, rtol=1e-3)


def test_neurons_add_up_to_what_the_mlp_does_along_a_direction(lm, corpus):
    neurons = capture(lm, corpus, [1], pool="mean", site="mlp_neurons", progress=False)[1]
    output, vectors, belongs = find_output(lm, 1, "mlp_neurons"), units(3, 64), membership(corpus)
    contributions = neuron_contributions(neurons, output, vectors, belongs)
    written = neurons @ output.weight.T
    for row, concept in enumerate(corpus.concepts):
        difference = written[corpus.positives(concept)].mean(0)
        difference = difference - written[corpus.negatives(concept)].mean(0)
        assert contributions[row].sum() == pytest.approx(float(difference @ vectors[row]), abs=1e-4)


def test_a_direction_that_is_a_neuron_is_found(lm):
    output = find_output(lm, 2, "mlp_neurons")
    vectors = units(3, 64)
    vectors[1] = torch.nn.functional.normalize(-output.weight[:, 17], dim=0)
    cosines = neuron_cosines(output, vectors)
    assert int(cosines[1].abs().argmax()) == 17 and cosines[1, 17] == pytest.approx(-1, abs=1e-5)


# The report


@pytest.fixture
def report(lm, corpus):
    acts = capture(lm, corpus, [1, 3], pool="mean", progress=False)
    return quality_report(lm, acts, corpus, extract(acts, corpus), progress=False)


def test_the_report_has_every_figure_for_every_concept_and_layer(report, corpus):
    frame = report.to_frame()
    assert list(frame.index) == [(c, layer) for c in corpus.concepts for layer in (1, 3)]
    numbers = frame.drop(columns=["head_concentration", "texts_wanted"]).select_dtypes("number")
    assert numbers.notna().all().all()
    one = report.figures["calm"][3]
    assert len(one["alignment"]["each"]) == one["n_texts"] == len(corpus.positives("calm"))
    assert one["heads"] == {"kind": "attention", "count": 4}
    assert {h["head"] for h in one["per_head"]} == {0, 1, 2, 3}
    assert report.figures["calm"][1]["heads"]["kind"] == "GatedDeltaNet"


def test_saving_and_loading_loses_nothing(report, tmp_path):
    path = report.save(tmp_path, notebook="04")
    again = amy.QualityReport.load(tmp_path)
    assert again.figures == report.figures and again.n_layers == report.n_layers
    assert json.loads(path.read_text())["notebook"] == "04"
    before = path.read_bytes()
    again.save(tmp_path)
    assert path.read_bytes() == before
    path.write_text("{}")
    with pytest.raises(
        ArtefactError, match="lacks concepts, n_layers, skipped: .*amygdala quality"
    ):
        amy.QualityReport.load(tmp_path)


def test_two_reports_are_the_same_bytes(lm, corpus, tmp_path):
    acts = capture(lm, corpus, [1, 3], pool="mean", progress=False)
    dirs = extract(acts, corpus)
    for folder in ("one", "two"):
        quality_report(lm, acts, corpus, dirs, progress=False).save(tmp_path / folder)
    one, two = ((tmp_path / f / "quality.json").read_bytes() for f in ("one", "two"))
    assert one == two


def test_experts_are_named_as_not_looked_into(loaded, corpus):
    experts = loaded("qwen3_next")
    acts = capture(experts, corpus, [1, 3], pool="mean", progress=False)
    report = quality_report(experts, acts, corpus, extract(acts, corpus), progress=False)
    assert report.skipped == dict.fromkeys((1, 3), "neurons (routed experts?)")
    assert "per_head" in report.figures["calm"][1]
    assert "not looked into: neurons" in report.triage()


def test_each_bucket_has_what_belongs_in_it():
    generator = torch.Generator().manual_seed(0)
    names = ["clean", "fragmented", "thin", "twin a", "twin b", "alone"]
    labels = [name for name in names[:5] for _ in range(12)] + ["alone"] + [None] * 200
    corpus = labelled(labels)
    hidden = 120
    values = torch.randn(len(labels), hidden, generator=generator)
    values[:12, 0] += 12
    values[24:36, 1] += 3.7
    values[36:60] *= 0.2
    values[36:60, 2] += 8
    acts = activations(corpus, values)
    report = quality_report(None, acts, corpus, extract(acts, corpus), progress=False)
    buckets = report.to_frame().xs(2, level="layer")["bucket"]
    assert buckets.to_dict() == {
        "clean": "clean", "fragmented": "fragmented", "thin": "needs-texts",
        "twin a": "redundant", "twin b": "redundant", "alone": "needs-texts",
    }  # fmt: skip
    text = report.triage()
    assert "redundant: 2" in text and "twin a (~twin b)" in text
    assert "thin (+" in text and len(text.splitlines()) <= 40


@pytest.mark.parametrize("n", [3, 200])
def test_the_triage_fits_a_screen(n):
    corpus = labelled([f"concept_number_{i % n}" for i in range(3 * n)])
    acts = activations(corpus, torch.randn(3 * n, 16))
    report = quality_report(None, acts, corpus, extract(acts, corpus), progress=False)
    lines = report.triage().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100


def test_what_does_not_belong_together_is_refused_with_all_reasons(corpus, lm):
    acts = capture(lm, corpus, [1], pool="mean", progress=False)
    dirs = extract(acts, corpus)
    other = labelled(["calm", "calm", "afraid"])
    with pytest.raises(AmygdalaError) as error:
        quality_report(None, acts, other, dirs)
    assert "other texts than the corpus" in str(error.value)
    assert "no texts for proud" in str(error.value)
    elsewhere = capture(lm, corpus, [2], pool="mean", progress=False)
    with pytest.raises(
        AmygdalaError, match=r"directions are at layers \[1\], activations at \[2\]"
    ):
        quality_report(None, elsewhere, corpus, dirs)
    both = capture(lm, corpus, [1, 2], pool="mean", progress=False)
    with pytest.raises(AmygdalaError, match=r"at layers \[1, 2\], activations at \[1\]: capture"):
        quality_report(None, acts, corpus, extract(both, corpus))
    with pytest.raises(AmygdalaError, match="one concept has no neighbours"):
        quality_report(None, acts, corpus, dirs.select(["calm"]))
    report = quality_report(None, acts, corpus, dirs)
    with pytest.raises(AmygdalaError, match=r"no layer 3 in this report: there are \[1\]"):
        report.triage(3)
