"""Apollo does the paper's sums, remembers little and exactly, and refuses what would do harm."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from amygdala_lib.errors import AmygdalaError, ArtefactError, TrainingError
from amygdala_lib.training.apollo import Apollo
from amygdala_lib.training.projection import draw_projections
from amygdala_lib.training.random_streams import normals, random_bits, stream_key
from amygdala_lib.training.rounding import round_stochastically
from amygdala_lib.training.updates import LIMITER_FLOOR

SHAPES = {
    "wide": (80, 200),
    "tall": (200, 80),
    "square": (96, 96),
    "experts": (3, 72, 100),
    "tall experts": (2, 100, 72),
}


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter(drawn(*shape, seed=seed, scale=0.1).to(dtype))


def gradients(shape, steps, seed=1):
    """Correlated from step to step, of sizes that rise and fall, with a channel of nothing."""
    common, found = drawn(*shape, seed=seed), []
    for step in range(steps):
        gradient = (common + drawn(*shape, seed=1000 * seed + step)) * 10 ** math.sin(step)
        gradient[..., 3 if shape[-1] >= shape[-2] else slice(None)] *= 0 if shape[-1] > 99 else 1
        found.append(gradient)
    return found


def take(optimizer, parameters, step_gradients):
    for parameter, gradient in zip(parameters, step_gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def snapshot(optimizer):
    """Everything an optimizer and its parameters hold, to compare to the bit."""
    held = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return held, weights


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# The paper's sums


class Reference:
    """Algorithm 1 of arXiv 2412.05270 on one matrix, m <= n, in float64, term by term."""

    def __init__(self, weight, *, rank, lr, betas, eps, decay, growth, name, seed, refresh):
        self.w, self.rank, self.lr, self.betas = weight.double(), rank, lr, betas
        self.eps, self.decay, self.growth, self.refresh = eps, decay, growth, refresh
        self.name, self.seed, self.t, self.before = name, seed, 0, None
        self.m = self.v = torch.zeros(rank, weight.shape[1], dtype=torch.float64)

    def step(self, g):
        (m, n), r, (b1, b2) = g.shape, self.rank, self.betas
        key = stream_key("projection", self.seed, self.name, self.t // self.refresh)
        p = draw_projections([key], r, m, torch.device("cpu"), torch.float32)[0].double()
        self.t += 1
        low = p @ g.double()
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low**2
        adapted = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        if r == 1:
            s = torch.full((n,), float(adapted.norm() / low.norm()), dtype=torch.float64)
        else:
            s = adapted.norm(dim=0) / low.norm(dim=0)
            s[low.norm(dim=0) == 0] = 0
        alpha = math.sqrt(m / r)
        update = alpha * g.double() * s  # column j by s_j
        if self.growth is not None and self.before is not None:
            most = self.growth * max(self.before, LIMITER_FLOOR * alpha * math.sqrt(r * n))
            update = update * min(1.0, most / float(update.norm()))
        self.before = float(update.norm())
        self.w = self.w - self.lr * self.decay * self.w - self.lr * update


@pytest.mark.parametrize("growth", [1.01, None])
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_twenty_steps_are_the_papers_in_float64(shape, rank, growth):
    parameter = weight(*shape)
    settings = {"lr": 1e-2, "rank": rank, "betas": (0.8, 0.98), "eps": 1e-7}
    optimizer = Apollo(
        [("layer.weight", parameter)],
        **settings,
        weight_decay=0.3,
        norm_growth_limit=growth,
        seed=5,
        proj_refresh=7,
    )
    is_tall = shape[-2] > shape[-1]

    def matrices(tensor):
        stack = tensor.detach().reshape(-1, *shape[-2:])
        return stack.mT if is_tall else stack

    before = matrices(parameter).clone().double()
    kept = {"decay": 0.3, "growth": growth, "seed": 5, "refresh": 7, "name": "layer.weight"}
    references = [Reference(matrix, **settings, **kept) for matrix in matrices(parameter)]
    for gradient in gradients(shape, 20):
        take(optimizer, [parameter], [gradient])
        for reference, matrix in zip(references, matrices(gradient), strict=True):
            reference.step(matrix)
    expected = torch.stack([reference.w for reference in references])
    assert relative(matrices(parameter).double() - before, expected - before) < 1e-5


@pytest.mark.parametrize("rank", [64, None])
def test_what_is_not_projected_is_updated_as_by_adamw(rank):
    shapes = [(40,), (), (4, 300), (60, 64), (12, 3, 2, 2), (8, 1, 4)]
    shapes += [(128, 256), (700, 800), (3, 500, 400)] if rank is None else []
    ours, theirs = ([weight(*shape) for shape in shapes] for _ in range(2))
    ours[4].data = ours[4].data.to(memory_format=torch.channels_last)
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, adamw = Apollo(ours, rank=rank, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(3):
        found = [drawn(*shape, seed=step) for shape in shapes]
        take(optimizer, ours, found)
        take(adamw, theirs, found)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("shape", "rank"), [((192, 256), 1), ((192, 256), 16), ((400, 128), 32)])
def test_projecting_makes_steps_smaller_by_the_root_of_rank_over_the_shorter_side(shape, rank):
    """So scale="auto" gives an update the norm that AdamW's has."""
    short = min(shape)
    ours, auto, adam = weight(*shape), weight(*shape), weight(*shape)
    optimizers = [
        Apollo([ours], lr=1.0, rank=rank, scale=1.0, norm_growth_limit=None),
        Apollo([auto], lr=1.0, rank=rank, norm_growth_limit=None),
        torch.optim.AdamW([adam], lr=1.0, weight_decay=0),
    ]
    for step in range(10):
        before = ours.detach().clone(), auto.detach().clone(), adam.detach().clone()
        for optimizer in optimizers:
            take(optimizer, optimizer.param_groups[0]["params"], [drawn(*shape, seed=step)])
    low, compensated, full = (
        now.detach() - was for now, was in zip((ours, auto, adam), before, strict=True)
    )
    sums = {"dim": 0 if shape[0] <= shape[1] else 1} if rank > 1 else {}
    ratio = (low.norm(**sums) / full.norm(**sums)).median()
    close = 0.2 if rank == 1 else 0.1  # one row is one draw
    assert float(ratio) == pytest.approx(math.sqrt(rank / short), rel=close)
    assert float(compensated.norm() / full.norm()) == pytest.approx(1, rel=close)


# The limiter


def update_norms(sizes, growth=1.01, shape=(64, 80)):
    """The norm of every update, in units of one that moves all entries by the learning rate."""
    parameter, norms = weight(*shape), []
    optimizer = Apollo([parameter], lr=1.0, rank=16, norm_growth_limit=growth)
    for step, size in enumerate(sizes):
        before = parameter.detach().double().clone()
        take(optimizer, [parameter], [size * drawn(*shape, seed=step)])
        norms.append(float((parameter.detach().double() - before).norm()) / math.sqrt(64 * 80))
    return norms


def test_an_update_grows_by_no_more_than_the_limit():
    sizes = [1.0] * 60 + [30.0] * 5
    free, limited = update_norms(sizes, growth=None), update_norms(sizes)
    assert max(b / a for a, b in zip(free, free[1:], strict=False)) > 1.5
    assert min(limited) > LIMITER_FLOOR
    growth = [b / a for a, b in zip(limited, limited[1:], strict=False)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)
    assert limited[0] == pytest.approx(free[0]), "there is nothing the first could have grown from"


def test_the_limiters_floor_lets_updates_recover_from_weak_gradients():
    """Without it a thousandfold dip takes 695 steps to make good."""
    norms = update_norms([1.0] * 5 + [1e-6] * 90 + [1.0])
    assert norms[-2] < 1e-3
    assert norms[-1] == pytest.approx(1.01 * LIMITER_FLOOR, rel=1e-4)


def test_a_gradient_of_zeros_changes_nothing_and_holds_nothing_back():
    sizes = [1.0, 1.0, 1.0]
    norms = update_norms([*sizes, 0.0, 0.0, 1.0])
    assert norms[3:5] == [0.0, 0.0]
    assert norms[5] > norms[2] / 2, "limited by the last update there was"


# Batches, and stepping in backward


def trained(lm, steps=3, in_backward=False, dtype=torch.float32, **settings):
    """A copy of a model after a few steps, and its optimizer."""
    model = copy.deepcopy(lm.model).requires_grad_(True).to(dtype)
    optimizer = Apollo(model.named_parameters(), **{"lr": 1e-3, "rank": 8, "seed": 3} | settings)
    ids = torch.arange(48).view(2, 24) % 300
    for _ in range(steps):
        if in_backward:
            with optimizer.step_in_backward():
                model(input_ids=ids, labels=ids).loss.backward()
        else:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def test_a_model_of_any_family_learns(causal_lm):
    ids = torch.arange(48).view(2, 24) % 300
    model, _ = trained(causal_lm, steps=8, lr=3e-3)
    with torch.no_grad():
        before, after = (m(input_ids=ids, labels=ids).loss for m in (causal_lm.model, model))
    assert after < 0.9 * before


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_stacking_weights_of_one_shape_changes_nothing(loaded, family):
    stacked, _ = trained(loaded(family))
    single, _ = trained(loaded(family), foreach=False)
    for (name, start), one, other in zip(
        loaded(family).model.named_parameters(),
        stacked.parameters(),
        single.parameters(),
        strict=True,
    ):
        assert relative(one - start, other - start) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stepping_in_backward_gives_the_same_bits(lm, dtype):
    after, _ = trained(lm, foreach=False, dtype=dtype)
    during, optimizer = trained(lm, in_backward=True, dtype=dtype)
    for (name, one), other in zip(after.named_parameters(), during.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(parameter.grad is None for parameter in during.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in during.parameters())


def test_in_backward_no_two_gradients_are_there_at_once(lm):
    model, ids = copy.deepcopy(lm.model).requires_grad_(True), torch.arange(12)[None]
    optimizer, there = Apollo(model.parameters(), rank=8), []

    def count(_):
        there.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    with optimizer.step_in_backward():
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(there) == len(list(model.parameters()))
    assert set(there) == {1}


def test_in_backward_what_is_lost_is_refused():
    parameter = weight(20, 30)
    optimizer = Apollo([parameter], rank=4)
    parameter.sum().backward()
    with (
        pytest.raises(TrainingError, match="cannot accumulate.*zero_grad"),
        optimizer.step_in_backward(),
    ):
        pass
    optimizer.zero_grad()
    with optimizer.step_in_backward():
        with pytest.raises(TrainingError, match="leave out step"):
            optimizer.step()
        with pytest.raises(TrainingError, match="active already"), optimizer.step_in_backward():
            pass
    parameter.sum().backward()
    before = parameter.detach().clone()
    optimizer.step()
    assert not torch.equal(parameter, before), "outside the block, step() works again"


def test_in_backward_a_gradient_that_is_not_finite_stops_it():
    """The weight it is for and those whose gradients were still to come are untouched."""
    first, second, last = (weight(20, 20, seed=seed) for seed in range(3))
    optimizer = Apollo([("first", first), ("second", second), ("last", last)], lr=0.1, rank=4)
    before = [parameter.detach().clone() for parameter in (first, second, last)]
    second.register_hook(lambda gradient: gradient * math.nan)
    x = drawn(5, 20)
    with pytest.raises(TrainingError, match="second"), optimizer.step_in_backward():
        (((x @ first).tanh() @ second).tanh() @ last).sum().backward()
    after = [parameter.detach() for parameter in (first, second, last)]
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False]
    assert list(optimizer.state) == [last]
    assert not any(
        p._post_accumulate_grad_hooks or p.grad is not None for p in (first, second, last)
    )


# What it remembers


def test_the_state_is_two_moments_of_rank_rows_and_two_numbers():
    parameter = weight(1024, 2048)
    optimizer = Apollo([parameter], rank=64)
    take(optimizer, [parameter], [drawn(1024, 2048)])
    state = optimizer.state[parameter]
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert {name: value.numel() for name, value in tensors.items()} == {
        "exp_avg": 64 * 2048,
        "exp_avg_sq": 64 * 2048,
        "update_norm": 1,
    }
    assert set(state) - set(tensors) == {"step"}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    assert size / parameter.numel() < 8 / 8, "an eighth of AdamW's 8 bytes a parameter"


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path, dtype, by_file):
    shapes = [(40, 60), (60, 40), (40, 60), (2, 30, 20), (33,), ()]

    def start():
        parameters = [weight(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]
        groups = [
            {"params": [(f"matrix.{n}", p) for n, p in enumerate(parameters[:4])]},
            {"params": [("norm", parameters[4]), ("gate", parameters[5])], "lr": 0.5, "rank": None},
        ]
        settings = {"lr": 1e-2, "rank": 8, "proj_refresh": 3, "warmup_steps": 4, "seed": 7}
        return parameters, Apollo(groups, **settings, weight_decay=0.01)

    def run(optimizer, parameters, steps):
        for step in steps:
            found = [drawn(*shape, seed=step) for shape in shapes]
            take(optimizer, parameters, found)

    parameters, unbroken = start()
    run(unbroken, parameters, range(5))
    saved = [parameter.detach().clone() for parameter in parameters]
    unbroken.save_state(tmp_path / "state.safetensors")
    state_dict = copy.deepcopy(unbroken.state_dict())
    run(unbroken, parameters, range(5, 11))

    again, resumed = start()
    for parameter, value in zip(again, saved, strict=True):
        parameter.data.copy_(value)
    if by_file:
        resumed.load_state(tmp_path / "state.safetensors")
    else:
        resumed.load_state_dict(state_dict)
    run(resumed, again, range(5, 11))
    assert same(snapshot(resumed), snapshot(unbroken))
    for name, of in resumed.state_dict()["state"].items():
        assert of["exp_avg"].dtype == torch.float32, name


def test_a_loaded_state_is_a_copy():
    one, other = weight(30, 40), weight(30, 40)
    first, second = Apollo([one], rank=4), Apollo([other], rank=4)
    take(first, [one], [drawn(30, 40)])
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict())
    take(first, [one], [drawn(30, 40, seed=1)])
    assert same(second.state_dict(), before)


def test_parameters_that_never_had_a_gradient_have_no_state_in_the_file_either(tmp_path):
    used, unused = weight(30, 40), weight(30, 40)
    optimizer = Apollo([("used", used), ("unused", unused)], rank=4)
    used.grad = drawn(30, 40)
    before = unused.detach().clone()
    optimizer.step()
    optimizer.save_state(tmp_path / "state.safetensors")
    resumed = Apollo([("used", used), ("unused", unused)], rank=4)
    resumed.load_state(tmp_path / "state.safetensors")
    assert list(resumed.state) == [used]
    assert torch.equal(unused, before)


def state_file(folder, names=("a", "b"), shape=(30, 40), rank=4):
    parameters = [weight(*shape, seed=n) for n in range(len(names))]
    optimizer = Apollo(list(zip(names, parameters, strict=True)), rank=rank, lr=0.123)
    take(optimizer, parameters, [drawn(*shape, seed=n) for n in range(len(names))])
    return optimizer.save_state(folder / "state.safetensors"), optimizer


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"rank": 6}, ["rank: 6 in the state, 4 in the optimizer"]),
        ({"shape": (30, 50)}, ["a: (30, 50) in the state, (30, 40) in the optimizer", "b: "]),
        ({"names": ("a", "c")}, ["1 of the state's 2", ": c", "1 of the optimizer's 2", ": b"]),
        ({"names": ("b", "a")}, ["another order"]),
        ({"names": ("a", "b", "c")}, ["1 of the state's 3 parameters are not in the optimizer: c"]),
        ({"rank": 6, "shape": (30, 50)}, ["rank: 6", "a: (30, 50)"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_both_values(tmp_path, made, said):
    path, other = state_file(tmp_path, **made)
    parameters = [weight(30, 40, seed=n) for n in range(2)]
    optimizer = Apollo(list(zip("ab", parameters, strict=True)), rank=4)
    take(optimizer, parameters, [drawn(30, 40, seed=n) for n in range(2)])
    before = snapshot(optimizer)
    with pytest.raises(TrainingError) as raised:
        optimizer.load_state(path)
    for words in said:
        assert words in str(raised.value)
    with pytest.raises(TrainingError):
        optimizer.load_state_dict(other.state_dict())
    assert same(snapshot(optimizer), before)


def test_files_that_are_not_states_are_refused_and_nothing_changes(tmp_path):
    path, optimizer = state_file(tmp_path)
    before = snapshot(optimizer)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def written(name, tensors=tensors, **changed):
        description = json.loads(metadata["apollo"]) | changed
        save_file(tensors, tmp_path / name, {"apollo": json.dumps(description)})
        return tmp_path / name

    newer = written("newer", format_version=99)
    lacking = written("lacking", {n: t for n, t in tensors.items() if n != "b.exp_avg"})
    save_file(tensors, tmp_path / "bare")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-40])
    for file, said in [
        (newer, "format 99"),
        (lacking, "b.exp_avg"),
        (tmp_path / "bare", "is not what"),
        (tmp_path / "cut", "damaged"),
        (tmp_path / "none", "is not there"),
    ]:
        with pytest.raises(ArtefactError, match=said):
            optimizer.load_state(file)
    adamw = torch.optim.AdamW([("a", weight(30, 40)), ("b", weight(30, 40))])
    with pytest.raises(TrainingError, match="another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    broken = optimizer.state_dict()
    broken["state"][0] = {"step": 1, "exp_avg": torch.zeros(1, 4, 39)}
    with pytest.raises(TrainingError, match="no exp_avg_sq") as raised:
        optimizer.load_state_dict(broken)
    assert "a.exp_avg: (1, 4, 39) in the state, (1, 4, 40) in the optimizer" in str(raised.value)
    assert same(snapshot(optimizer), before)


def test_a_state_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path, optimizer = state_file(tmp_path)
    before = path.read_bytes()
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(ArtefactError):
        optimizer.save_state(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# Random numbers


def test_the_streams_are_splitmix64():
    """The published outputs for the seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = random_bits(torch.tensor([1234567]), 0, 5)[0]
    assert bits.numpy().view(np.uint64).tolist() == published
    assert torch.equal(random_bits(torch.tensor([1234567]), 2, 3)[0], bits[2:])


def test_normals_are_normal_and_independent_between_keys():
    keys = torch.tensor([stream_key("projection", 0, name, 0) for name in "ab"])
    found = normals(keys, 200_001).double()
    assert found.isfinite().all()
    for moment, expected in enumerate([0, 1, 0, 3], start=1):
        assert ((found**moment).mean(1) - expected).abs().max() < 0.05
    assert float(torch.corrcoef(found)[0, 1]) == pytest.approx(0, abs=0.01)
    assert float((found[:, 1:] * found[:, :-1]).mean()) == pytest.approx(0, abs=0.01)
    assert torch.equal(normals(keys[1:], 200_001)[0].double(), found[1])


def one_step(names, values, **settings):
    parameters = {name: torch.nn.Parameter(values[name].clone()) for name in names}
    optimizer = Apollo(parameters.items(), lr=0.1, rank=4, **settings)
    steps = settings.get("proj_refresh", 1)
    for _ in range(steps):
        take(optimizer, parameters.values(), [drawn(30, 40) for _ in names])
    return {name: value.detach() for name, value in parameters.items()}


def test_projections_depend_on_seed_and_name_and_neither_on_order_nor_on_global_state():
    values = {name: drawn(30, 40) for name in "ab"}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    found = one_step("ab", values, foreach=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(one_step("ba", values, foreach=False)["a"], found["a"])
    assert not torch.equal(found["a"], found["b"])
    assert not torch.equal(one_step("ab", values, seed=1)["a"], found["a"])


def test_projections_change_after_as_many_steps_as_said():
    def low_rank(refresh):
        parameter, seen = weight(30, 40), []
        optimizer = Apollo([parameter], rank=4, betas=(0, 0.999), proj_refresh=refresh)
        for _ in range(5):
            take(optimizer, [parameter], [drawn(30, 40)])
            seen.append(optimizer.state[parameter]["exp_avg"].clone())
        return [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]

    assert low_rank(5) == [True] * 4
    assert low_rank(2) == [True, False, True, False]


# bfloat16


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=9),
    st.integers(-(2**63), 2**63 - 1),
)
def test_stochastic_rounding_goes_to_a_neighbour(values, key):
    values = torch.tensor(values)
    found = round_stochastically(values, key).float()
    down = (values.view(torch.int32) & -65536).view(torch.float32)
    up = (down.view(torch.int32) + 65536).view(torch.float32)
    assert ((found == down) | (found == up)).all()
    exact = values.to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), key), exact)


def test_stochastic_rounding_keeps_the_mean_and_what_is_not_a_number():
    value = torch.full((100, 1001), 1 + 0.3 / 128)
    found = round_stochastically(value, 11).float()
    assert set(found.unique().tolist()) == {1.0, 1 + 1 / 128}
    assert float((found - 1).mean() * 128) == pytest.approx(0.3, abs=0.01)
    transposed = round_stochastically(value.mT, 11)
    assert float((transposed.float() - 1).mean() * 128) == pytest.approx(0.3, abs=0.01)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    found = round_stochastically(special, 3)
    torch.testing.assert_close(found, special.to(torch.bfloat16), equal_nan=True)


@pytest.mark.parametrize("shape", [(64, 80), (64,)])
def test_bfloat16_weights_follow_updates_below_their_last_digit_only_if_rounded_stochastically(
    shape,
):
    def moved(stochastic_rounding):
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        settings = {"lr": 2e-4, "rank": 16, "stochastic_rounding": stochastic_rounding}
        optimizer = Apollo([parameter], **settings)
        for _ in range(20):
            take(optimizer, [parameter], [torch.ones(shape)])
        return float(1 - parameter.detach().double().mean())

    assert moved(stochastic_rounding=False) == 0
    assert moved(stochastic_rounding=True) == pytest.approx(20 * 2e-4, rel=0.25)


@pytest.mark.parametrize(
    "shape", [(700, 1000), (1000, 700), (3, 500, 600), (90000,), (40, 24, 4, 4)]
)
def test_bfloat16_weights_are_float32_ones_rounded_however_many_pieces_they_are_done_in(shape):
    low, high = weight(*shape, dtype=torch.bfloat16), weight(*shape)
    high.data.copy_(low.data)
    optimizers = [Apollo([("w", p)], lr=0.02, rank=4, weight_decay=0.1) for p in (low, high)]
    gradient = drawn(*shape).to(torch.bfloat16)
    for optimizer, parameter in zip(optimizers, (low, high), strict=True):
        take(optimizer, [parameter], [gradient])
    moments = [optimizer.state[p] for optimizer, p in zip(optimizers, (low, high), strict=True)]
    assert moments[0]["exp_avg"].dtype == torch.float32
    assert relative(moments[0]["exp_avg"], moments[1]["exp_avg"]) < 1e-6
    error = low.detach().float() - high.detach()
    last_digit = 2.0 ** (high.detach().abs().log2().floor() - 7)
    assert (error.abs() <= last_digit * 1.001).all()
    assert abs(float((error / last_digit).mean())) < 0.01, "and none is rounded more one way"
    assert float((error / last_digit).std()) > 0.2


# As a torch optimizer


def test_groups_have_settings_of_their_own():
    shapes = {"a": (30, 40), "b": (50, 20)}
    settings = {
        "a": {"lr": 0.1, "rank": 4, "scale": 2.0, "betas": (0.5, 0.9), "seed": 1},
        "b": {"rank": 1, "norm_growth_limit": None, "weight_decay": 0.5, "proj_refresh": 2},
    }

    def run(together):
        parameters = {name: weight(*shape) for name, shape in shapes.items()}
        groups = [{"params": [(n, parameters[n])], **settings[n]} for n in shapes]
        optimizers = [Apollo(groups, lr=0.2)] if together else [Apollo([g], lr=0.2) for g in groups]
        for step in range(4):
            for name, parameter in parameters.items():
                parameter.grad = drawn(*shapes[name], seed=step)
            for optimizer in optimizers:
                optimizer.step()
        return parameters

    assert same(run(together=True), run(together=False))


def test_warming_up_is_a_schedule_that_rises_linearly():
    warmed, scheduled = weight(30, 40), weight(30, 40)
    ours = Apollo([warmed], lr=0.1, rank=4, warmup_steps=3)
    theirs = Apollo([scheduled], lr=0.1, rank=4)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: min(1, (step + 1) / 3))
    for step in range(5):
        take(ours, [warmed], [drawn(30, 40, seed=step)])
        take(theirs, [scheduled], [drawn(30, 40, seed=step)])
        schedule.step()
    torch.testing.assert_close(warmed, scheduled, rtol=1e-6, atol=1e-8)


def test_schedules_clipping_and_closures_work_as_with_any_optimizer():
    parameter, other = weight(30, 40), weight(30, 40)
    ours, fixed = Apollo([parameter], lr=0.1, rank=4), Apollo([other], lr=0.05, rank=4)
    schedule = torch.optim.lr_scheduler.ConstantLR(ours, factor=0.5, total_iters=10)
    x = drawn(8, 30)

    def closure():
        ours.zero_grad()
        loss = (x @ parameter).square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter], 1e-3)
        return loss

    losses = [float(ours.step(closure).detach()) for _ in range(3)]
    schedule.step()
    assert losses == sorted(losses, reverse=True)
    assert float(parameter.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
    other.grad = parameter.grad
    fixed.load_state_dict(ours.state_dict())
    fixed.param_groups[0]["lr"] = 0.0
    before = other.detach().clone()
    fixed.step()
    assert torch.equal(other, before), "settings may be changed between steps"


def test_a_schedule_does_not_warn_when_backward_steps():
    parameter = weight(30, 40)
    optimizer = Apollo([parameter], lr=0.1, rank=4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings(), optimizer.step_in_backward():
        warnings.simplefilter("error")
        for _ in range(2):
            parameter.square().sum().backward()
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("where", ["matrix", "vector", "stacked"])
def test_a_gradient_that_is_not_finite_refuses_the_whole_step(where, bad):
    names = {"matrix": (700, 400), "vector": (40,), "stacked": (30, 40), "fine": (30, 40)}
    parameters = {name: weight(*shape) for name, shape in names.items()}
    optimizer = Apollo(parameters.items(), lr=0.1, rank=4)
    take(optimizer, parameters.values(), [drawn(*shape) for shape in names.values()])
    before = snapshot(optimizer)
    parameters[where].grad.view(-1)[7] = bad
    with pytest.raises(TrainingError, match=f"1 gradients.*{where} first"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


def test_everything_wrong_with_the_settings_is_said_at_once():
    wrong = {
        "lr": -1,
        "rank": 0,
        "betas": (0.9, 1.0),
        "eps": 0,
        "weight_decay": -0.1,
        "scale": "big",
        "proj_refresh": 1.5,
        "norm_growth_limit": 1.0,
        "seed": None,
        "warmup_steps": -1,
    }
    with pytest.raises(TrainingError) as raised:
        Apollo([weight(30, 40)], **wrong)
    for name, value in wrong.items():
        assert f"{name} is {value!r}" in str(raised.value)
    optimizer = Apollo([("a", weight(30, 40))])
    for group, said in [
        ({"params": [("b", weight(3, 4))], "rank": -1}, "rank is -1"),
        ({"params": [("a", weight(3, 4))]}, "more than one parameter is called a"),
        ({"params": [("c", torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat)))]}, "complex"),
    ]:
        with pytest.raises(TrainingError, match=said):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert issubclass(TrainingError, AmygdalaError)


def test_a_sparse_gradient_is_refused():
    embedding = torch.nn.Embedding(50, 20, sparse=True)
    optimizer = Apollo(embedding.named_parameters(), rank=4)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TrainingError, match="sparse gradients are not supported: weight"):
        optimizer.step()


# Several processes

SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from amygdala_lib.training.apollo import Apollo

rank, folder, dtype = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def new(sharded):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 90), torch.nn.Tanh(), torch.nn.Linear(90, 33), torch.nn.LayerNorm(33)
    ).to(dtype)
    if sharded:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    settings = dict(lr=1e-2, rank=8, weight_decay=0.1, stochastic_rounding=False)
    return model, Apollo(model.named_parameters(), **settings)

def run(model, optimizer, steps):
    for step in steps:
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().sum().mul(0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

def values(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]

whole, optimizer = new(False)
run(whole, optimizer, range(6))
model, optimizer = new(True)
run(model, optimizer, range(3))
optimizer.save_state(f"{folder}/state.safetensors")
dist.barrier()
start = [value.detach().clone() for value in values(model)]
run(model, optimizer, range(3, 6))
tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.01)
for one, other in zip(values(model), values(whole)):
    torch.testing.assert_close(one, other, **tolerance)

again, resumed = new(True)
resumed.load_state(f"{folder}/state.safetensors")
with torch.no_grad():
    for p, value in zip(again.parameters(), start):
        p.copy_(torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements))
run(again, resumed, range(3, 6))
for one, other in zip(values(again), values(model)):
    assert torch.equal(one, other)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_that_share_the_weights_do_what_one_does(tmp_path, dtype):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(tmp_path), dtype],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
