"""Task vectors are held against one another, and against chance."""

import numpy as np
import pandas as pd
import pytest
import torch

from amygdala_lib.errors import TrainingError
from amygdala_lib.training.comparison import (
    Outcome,
    cost_at_equal_effect,
    interference,
    random_like,
)
from amygdala_lib.training.task_vectors import TaskVector


def vectors(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.q_proj": (8, 5), "b.q_proj": (3, 7), "a.norm": (6,)}
    return [
        TaskVector.from_tensors(
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        )
        for _ in range(n)
    ]


def test_a_vector_agrees_with_itself_and_conflicts_with_its_negative():
    (one,) = vectors(1)
    same, contrary = interference(one, one), interference(one, -one)
    assert list(same.index) == one.names
    assert same["cosine"].to_list() == pytest.approx([1, 1, 1]) and (same["conflicts"] == 0).all()
    assert contrary["cosine"].to_list() == pytest.approx([-1, -1, -1])
    assert (contrary["conflicts"] == 1).all()
    assert same["entries"].to_list() == [40, 21, 6]


def test_entries_that_only_one_changes_are_no_conflict():
    first = TaskVector.from_tensors({"w": torch.tensor([1.0, -2.0, 3.0, 0.0, 1.0])})
    second = TaskVector.from_tensors({"w": torch.tensor([-1.0, -2.0, 0.0, 5.0, 2.0])})
    row = interference(first, second).loc["w"]
    assert row["entries"] == 3 and row["conflicts"] == pytest.approx(1 / 3)
    assert row["cosine"] == pytest.approx((-1 + 4 + 2) / (15**0.5 * 34**0.5))


def test_a_group_is_as_if_its_weights_were_one():
    one, other = vectors()
    groups = pd.Series({"a.q_proj": "q_proj", "b.q_proj": "q_proj"})
    found = interference(one, other, groups)
    assert list(found.index) == ["q_proj"], "what has no group is left out"
    flat = [torch.cat([v["a.q_proj"].flatten(), v["b.q_proj"].flatten()]) for v in (one, other)]
    row = found.loc["q_proj"]
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), abs=1e-6)
    assert row["conflicts"] == pytest.approx((flat[0].sign() != flat[1].sign()).double().mean())
    assert row["norm_second"] == pytest.approx(flat[1].norm().item())


def test_of_unrelated_vectors_half_of_the_signs_conflict():
    big = TaskVector.from_tensors({"w": torch.ones(400, 400)})
    row = interference(random_like(big, 1), random_like(big, 2)).loc["w"]
    assert abs(row["cosine"]) < 0.01 and row["conflicts"] == pytest.approx(0.5, abs=0.01)


def test_a_weight_that_one_leaves_alone_has_no_angle():
    still = TaskVector.from_tensors({"w": torch.zeros(4)})
    moved = TaskVector.from_tensors({"w": torch.ones(4)})
    row = interference(still, moved).loc["w"]
    assert pd.isna(row["cosine"]) and pd.isna(row["conflicts"]) and row["entries"] == 0


def test_what_does_not_fit_is_named():
    (one,) = vectors(1)
    other = TaskVector.from_tensors({"a.q_proj": torch.ones(5, 8)})
    with pytest.raises(TrainingError) as refused:
        interference(one, other)
    assert "a.norm" in str(refused.value) and "(8, 5)" in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_vector_has_the_norms_of_the_other(dtype):
    wanted = TaskVector.from_tensors(
        {"big": 3 * torch.rand(64, 64, dtype=dtype), "zero": torch.zeros(5, dtype=dtype)}
    )
    drawn = random_like(wanted)
    assert drawn["big"].dtype == dtype
    assert drawn["big"].norm().item() == pytest.approx(wanted["big"].norm().item(), rel=1e-5)
    assert torch.equal(drawn["zero"], wanted["zero"])
    assert (
        abs(torch.cosine_similarity(drawn["big"].flatten(), wanted["big"].flatten(), dim=0)) < 0.1
    )
    assert drawn.provenance["operation"] == "random"


def test_a_random_vector_depends_on_its_seed_and_on_nothing_else():
    (one,) = vectors(1)
    torch.manual_seed(1)
    first = random_like(one, 5)
    state = torch.random.get_rng_state()
    forward = {name: first[name] for name in one.names}
    assert torch.equal(torch.random.get_rng_state(), state)
    again = random_like(one, 5)
    for name in reversed(one.names):
        assert torch.equal(again[name], forward[name])
        assert not torch.equal(random_like(one, 6)[name], forward[name])
    assert not torch.equal(forward["a.q_proj"].flatten()[:6], forward["a.norm"])


# At equal effect


def outcome(effect, cost, n=40, spread=0.1, seed=0):
    rng = np.random.default_rng(seed)
    noise = [spread * rng.standard_normal(n) for _ in range(2)]
    return Outcome(effect + noise[0] - noise[0].mean(), cost + noise[1] - noise[1].mean())


CURVE = [outcome(0.8, 4.0, seed=1), outcome(0.0, 0.0, seed=2), outcome(0.4, 1.0, seed=3)]


@pytest.mark.parametrize(("effect", "there"), [(0.2, 0.5), (0.4, 1.0), (0.6, 2.5)])
def test_the_cost_is_held_against_that_of_the_curve_at_the_same_effect(effect, there):
    found, low, high = cost_at_equal_effect(outcome(effect, 2.0), CURVE)
    assert found == pytest.approx(2.0 - there)
    assert low < found < high


def test_the_interval_covers_about_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        points = [(0.0, 0.0), (0.8, 4.0), (0.5, 2.0)]
        *curve, one = (
            Outcome(x + rng.standard_normal(60) / 4, y + rng.standard_normal(60)) for x, y in points
        )
        _, low, high = cost_at_equal_effect(one, curve, draws=200)
        covered += low <= -0.5 <= high
    assert 34 <= covered <= 40


def test_texts_of_which_nothing_can_be_said_are_left_out():
    one = outcome(0.4, 2.0)
    known = cost_at_equal_effect(one, CURVE)[0]
    gaps = Outcome(np.append(one.effect, np.nan), np.append(one.cost, np.nan))
    curve = [Outcome(np.append(c.effect, np.nan), np.append(c.cost, np.nan)) for c in CURVE]
    assert cost_at_equal_effect(gaps, curve)[0] == pytest.approx(known)


@pytest.mark.parametrize("effect", [-0.1, 0.9])
def test_beyond_the_curve_nothing_is_said(effect):
    assert np.isnan(cost_at_equal_effect(outcome(effect, 1.0), CURVE)).all()


def test_outcomes_that_cannot_be_compared_are_refused_with_all_that_is_wrong():
    with pytest.raises(TrainingError, match="give two or more(.|\\n)*numbers are"):
        cost_at_equal_effect(outcome(0.1, 1.0), [outcome(0.1, 1.0, n=7)])
