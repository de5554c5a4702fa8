"""A concept with one direction, one with a spread, and one with nothing to say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import activations, labelled

from amygdala_lib.directions import extract
from amygdala_lib.errors import AmygdalaError
from amygdala_lib.spectrum import (
    components_for,
    effective_dimension,
    first_pc_ratio,
    spectrum,
    variances,
)


@given(n=st.integers(2, 20), hidden=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_variances_are_the_eigenvalues_of_the_covariance(n, hidden, seed):
    rng = np.random.default_rng(seed)
    deltas = rng.normal(size=(n, hidden)) + 20
    expected = np.linalg.eigvalsh(np.atleast_2d(np.cov(deltas.T)))[::-1][: n - 1]
    found = variances(torch.tensor(deltas, dtype=torch.float32)).numpy()
    assert len(found) == min(n - 1, hidden)
    assert np.abs(found - expected[: len(found)]).max() < 1e-3
    ratio = first_pc_ratio(torch.tensor(deltas))
    assert ratio == pytest.approx(expected[0] / expected.sum(), abs=1e-3)


def test_figures_of_known_spectra():
    even = torch.ones(10)
    assert components_for(0.9, even) == 9
    assert effective_dimension(even) == pytest.approx(10)
    steep = torch.tensor([0.95, 0.03, 0.02])
    assert components_for(0.9, steep) == 1
    assert effective_dimension(steep) == pytest.approx(1 / (0.95**2 + 0.03**2 + 0.02**2))
    assert first_pc_ratio(torch.tensor([[0.0, 1], [0, 2], [0, 9]])) == pytest.approx(1)


def test_one_text_has_no_variance():
    with pytest.raises(ValueError, match="1 texts have no variance: give at least 2"):
        first_pc_ratio(torch.ones(1, 4))


def test_a_line_and_a_ball_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    labels = ["line"] * 12 + ["ball"] * 12 + ["alone"]
    corpus = labelled(labels)
    values = 0.02 * torch.randn(25, 40, generator=generator)
    values[:12] += torch.randn(12, 1, generator=generator) * torch.eye(40)[0]
    values[12:24] += torch.randn(12, 40, generator=generator)
    values[24] += 3
    acts = activations(corpus, values)
    found = spectrum(acts, corpus, extract(acts, corpus))
    frame = found.to_frame().xs(2, level="layer")
    assert frame.loc["line", "first_pc_ratio"] > 0.95
    assert frame.loc["line", "k_signal_at_90pct"] == 1
    assert frame.loc["line", "noise_inflation"] < 1.1
    assert frame.loc["ball", "first_pc_ratio"] < 0.3
    assert 6 <= frame.loc["ball", "effective_dim_full"] <= 11
    assert frame.loc["alone"].isna().all()
    shares = found.shares(2)
    assert shares.loc["ball"].sum() == pytest.approx(1) and shares.shape == (3, 11)


def test_activations_of_other_texts_are_refused():
    corpus = labelled(["calm", "calm", "afraid"])
    acts = activations(corpus, torch.randn(3, 8))
    dirs = extract(acts, corpus)
    with pytest.raises(
        AmygdalaError, match=r"other texts than the corpus: run capture\(lm, corpus"
    ):
        spectrum(acts.select(corpus.texts[:2]), corpus, dirs)
