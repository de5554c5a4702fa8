"""A run trains what it says, tells what it changed, and can be killed, tried or refused safely."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from amygdala_lib import Readout, artefacts, capture, extract, load_model
from amygdala_lib.artefacts import repository_root
from amygdala_lib.cli import training
from amygdala_lib.errors import AmygdalaError, ArtefactError, TrainingError
from amygdala_lib.models import weight_hash
from amygdala_lib.training import Apollo, frozen_context_loss, train
from amygdala_lib.training.examples import Example

GENERATOR = torch.Generator().manual_seed(0)


def some_ids(n):
    return tuple(torch.randint(1, 300, (n,), generator=GENERATOR).tolist())


def some_examples(n, rejected=False):
    return [
        Example(
            context_ids=some_ids(2 + i % 5),
            continuation_ids=some_ids(1 + i % 4),
            rejected_ids=some_ids(3) if rejected else None,
        )
        for i in range(n)
    ]


EXAMPLES = some_examples(6)
PAIRS = some_examples(6, rejected=True)
QUIET = {"progress": False, "rank": 4, "lr": 1e-3}


@pytest.fixture
def new_model(model_folder):
    """A model of this test's own, the same each time it is asked for."""
    return lambda family="qwen3", **options: load_model(
        model_folder(family), device="cpu", **options
    )


def weights_of(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def are_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Killed(BaseException):
    """As a power cut would, for all that the code under test can do about it."""


def killed_in_step(lm, number, **options):
    """Run `train` until the backward pass of that step."""
    seen = 0

    def count(gradient):
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed

    embedding = lm.model.get_input_embeddings().weight
    lm.model.requires_grad_(True)
    hook = embedding.register_hook(count)
    lm.model.requires_grad_(False)
    try:
        with pytest.raises(Killed):
            train(lm, **options)
    finally:
        hook.remove()


# What it does


def test_examples_become_likelier_and_the_account_adds_up(new_model):
    lm = new_model("qwen3_5")
    before, first = weights_of(lm), weight_hash(lm.model)
    result = train(lm, EXAMPLES, batch_size=3, epochs=4, watch=EXAMPLES[:5], **QUIET)

    assert len(result.steps) == 8 and len(result.skipped) == 0
    assert result.steps["loss"].iloc[-2:].mean() < result.steps["loss"].iloc[:2].mean() - 0.1
    likelier = result.log_probabilities
    assert (likelier["continuation after"] > likelier["continuation before"]).all()
    assert len(likelier) == 5 and "rejected before" not in likelier
    for example, row in zip(EXAMPLES, likelier.itertuples(), strict=False):
        with torch.no_grad():
            loss = frozen_context_loss(lm, example.context_ids, example.continuation_ids)
        assert row[2] == pytest.approx(-loss.item(), abs=1e-5)

    assert (result.weights_before, result.weights_after) == (first, weight_hash(lm.model))
    assert first != result.weights_after
    after = weights_of(lm)
    for name, row in result.changes.iterrows():
        assert row["change"] == pytest.approx((after[name] - before[name]).norm().item(), rel=1e-4)
        assert row["norm"] == pytest.approx(before[name].norm().item(), rel=1e-5)
        assert row["changed"] == (after[name] != before[name]).float().mean()
    assert (result.changes["change"] > 0).all() and (result.changes["gradient"] > 0).all()
    found = result.changes.loc["model.layers.0.linear_attn.A_log"]
    assert (found["layer"], found["part"]) == (0, "linear_attn.A_log")
    assert "8 steps of SFT" in result.summary() and first in result.summary()


def test_a_step_is_the_frozen_context_loss_and_the_optimizers_step(new_model):
    lm, by_hand = new_model(), new_model()
    train(lm, EXAMPLES, batch_size=6, optimizer=torch.optim.AdamW, lr=1e-3, progress=False)
    by_hand.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-3)
    frozen_context_loss(
        by_hand,
        [example.context_ids for example in EXAMPLES],
        [example.continuation_ids for example in EXAMPLES],
    ).backward()
    optimizer.step()
    # Adam's first step is lr times a sign: rounding shows where a gradient is nothing but rounding.
    apart = [
        ((a - b).abs() > 1e-6).float().mean()
        for a, b in zip(weights_of(lm).values(), weights_of(by_hand).values(), strict=True)
    ]
    assert max(apart) < 0.01


def test_a_batch_in_parts_has_the_gradient_of_the_whole(new_model):
    options = {"batch_size": 6, "steps": 3, "optimizer": torch.optim.SGD, "lr": 0.1}
    whole, parts = new_model("qwen3_5"), new_model("qwen3_5")
    one = train(whole, EXAMPLES, progress=False, **options)
    other = train(parts, EXAMPLES, progress=False, accumulate=4, **options)
    assert furthest(weights_of(whole), weights_of(parts)) < 5e-5
    assert one.steps["grad_norm"].tolist() == pytest.approx(other.steps["grad_norm"].tolist(), 1e-4)


def test_equal_calls_give_equal_bits_and_the_seed_is_the_order(new_model):
    state = torch.random.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        lm = new_model()
        train(lm, EXAMPLES, batch_size=2, seed=seed, **QUIET)
        found.append(weights_of(lm))
    assert are_equal(found[0], found[1])
    assert not are_equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("objective", ["dpo", "dpop", "orpo"])
def test_preferences_widen_the_margin(new_model, objective):
    result = train(new_model(), PAIRS, objective=objective, batch_size=6, steps=5, **QUIET)
    steps = result.steps
    assert steps["margin"].iloc[-1] > steps["margin"].iloc[0]
    if objective != "orpo":  # the reference is of the first weights, so nothing differs yet
        assert steps["margin"].iloc[0] == pytest.approx(0, abs=1e-5)
        assert steps["loss"].iloc[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    gained = result.log_probabilities
    chosen = gained["continuation after"] - gained["continuation before"]
    rejected = gained["rejected after"] - gained["rejected before"]
    assert chosen.mean() > rejected.mean()


def test_replay_takes_its_share_and_counts_by_its_likelihood(new_model):
    replay = some_examples(40)
    result = train(
        new_model(), PAIRS, objective="dpo", replay=replay, batch_size=4, steps=3, **QUIET
    )
    mixed = result.steps["tokens"].sum()
    alone = train(new_model(), PAIRS, objective="dpo", batch_size=4, steps=3, **QUIET)
    assert mixed != alone.steps["tokens"].sum()
    # log 2 of the pairs, and more of what nothing is known about
    assert result.steps["loss"].iloc[0] > alone.steps["loss"].iloc[0] + 0.5


def test_only_the_chosen_parameters_move(new_model):
    lm = new_model("qwen3_5")
    before = weights_of(lm)
    result = train(
        lm, EXAMPLES, parameters=["*.in_proj_qkv.weight", "*.A_log"], batch_size=6, **QUIET
    )
    moved = {name for name, now in weights_of(lm).items() if not torch.equal(now, before[name])}
    assert moved == set(result.changes.index)
    assert {name.split(".", 4)[-1] for name in moved} == {"in_proj_qkv.weight", "A_log"}


def test_the_learning_rate_warms_up_and_follows_its_schedule(new_model):
    def rates(schedule, warmup_steps=0):
        options = {"schedule": schedule, "warmup_steps": warmup_steps, "dry_run": True}
        result = train(
            new_model(), EXAMPLES[:1], batch_size=1, steps=4, progress=False, lr=1.0, **options
        )
        return result.steps["lr"].tolist()

    assert rates("constant") == [1, 1, 1, 1]
    assert rates("linear") == [1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates("linear", 2) == [0.5, 1, 1, 0.5]


def test_clipping_bounds_the_step_and_the_norm_before_it_is_reported(new_model):
    lm = new_model()
    before = weights_of(lm)
    options = {"optimizer": torch.optim.SGD, "lr": 0.5, "progress": False}
    result = train(lm, EXAMPLES, batch_size=6, clip=0.01, **options)
    moved = [(now - before[name]).norm() for name, now in weights_of(lm).items()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert result.steps["grad_norm"].iloc[0] > 0.1


def test_stepping_in_backward_gives_the_same_weights(new_model):
    ordinary, in_backward = new_model("qwen3_5"), new_model("qwen3_5")
    one = train(ordinary, EXAMPLES, batch_size=3, epochs=2, foreach=False, **QUIET)
    other = train(in_backward, EXAMPLES, batch_size=3, epochs=2, step_in_backward=True, **QUIET)
    assert furthest(weights_of(ordinary), weights_of(in_backward)) < 1e-6
    columns = ["gradient", "change"]
    assert torch.allclose(
        torch.tensor(one.changes[columns].values),
        torch.tensor(other.changes[columns].values),
        rtol=1e-3,
    )


@pytest.mark.parametrize("dry_run", [False, True])
def test_stepping_in_backward_keeps_no_gradient_longer_than_it_takes(new_model, dry_run):
    lm, there = new_model(), []
    parameters = list(lm.model.parameters())

    def count(gradient):
        there.append(sum(p.grad is not None for p in parameters))

    lm.model.requires_grad_(True)
    for parameter in parameters:
        parameter.register_hook(count)
    lm.model.requires_grad_(False)
    train(lm, EXAMPLES, step_in_backward=True, dry_run=dry_run, **QUIET)
    assert len(there) == len(parameters) and max(there) <= 1


def test_bfloat16_weights_stay_bfloat16_and_learn(new_model):
    lm = new_model("qwen3_5", dtype=torch.bfloat16)
    result = train(lm, EXAMPLES, batch_size=6, steps=8, **QUIET)
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    assert result.steps["loss"].iloc[-1] < result.steps["loss"].iloc[0]


def test_a_readout_says_what_moved_inside(new_model, corpus):
    lm = new_model("qwen3_5")
    acts = capture(lm, corpus, [1, 3], pool="mean", cache=None, progress=False)
    readout, texts = Readout(extract(acts, corpus)), ["Rain on the roof.", "She counted."]
    result = train(lm, EXAMPLES, batch_size=6, steps=2, readout=readout, texts=texts, **QUIET)
    assert list(result.readings.index.names) == ["layer", "concept"]
    assert (result.readings["before"] != result.readings["after"]).all()
    acts = capture(lm, texts, [1, 3], pool="mean", cache=None, progress=False)
    expected = readout.project(acts[3], 3).mean(0)
    assert result.readings.loc[3]["after"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# Nothing is lost


def test_a_dry_run_changes_no_bit_and_writes_no_file(new_model, tmp_path):
    lm = new_model("qwen3_5")
    first, before = weight_hash(lm.model), weights_of(lm)
    for options in ({}, {"step_in_backward": True}):
        result = train(
            lm, EXAMPLES, batch_size=3, dry_run=True, folder=tmp_path / "run", **options, **QUIET
        )
        assert weight_hash(lm.model) == first == result.weights_before == result.weights_after
        assert are_equal(weights_of(lm), before)
        assert len(result.steps) == 2 and "as they were" in result.summary()
        assert "continuation after" not in result.log_probabilities
        assert not list(tmp_path.iterdir()) and result.folder is None


@pytest.mark.parametrize(
    "options", [{}, {"step_in_backward": True}, {"clip": 0.5, "warmup_steps": 3}]
)
def test_a_dry_run_foretells_the_first_step(new_model, options):
    options = options | {"batch_size": 6, "progress": False, "rank": 4, "lr": 1e-5}
    foretold = train(new_model("qwen3_5"), EXAMPLES, dry_run=True, foreach=False, **options)
    done = train(new_model("qwen3_5"), EXAMPLES, steps=2, foreach=False, **options)
    one = train(new_model("qwen3_5"), EXAMPLES, steps=1, foreach=False, **options)
    for column in ("norm", "gradient", "change", "changed"):
        expected = one.changes[column].tolist()
        assert foretold.changes[column].tolist() == pytest.approx(expected, rel=1e-3), column
    gained = done.steps["loss"].iloc[1] - done.steps["loss"].iloc[0]
    if "clip" not in options:
        assert foretold.changes["loss_change"].sum() == pytest.approx(gained, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"step_in_backward": True}])
def test_a_loss_that_is_not_a_number_changes_nothing(new_model, options):
    lm = new_model()
    marker = 399  # in no other example

    def poison(module, inputs, keywords, output):
        if marker in keywords["input_ids"]:
            output.logits.mul_(torch.nan)
        return output

    hook = lm.model.register_forward_hook(poison, with_kwargs=True)
    poisoned = [Example((5, marker), (6, 7), None)]
    before = weight_hash(lm.model)
    result = train(lm, poisoned, batch_size=1, watch=EXAMPLES[:1], **options, **QUIET)
    assert weight_hash(lm.model) == before == result.weights_after
    assert result.steps["skipped"].tolist() == ["loss is nan"]
    assert result.changes["gradient"].eq(0).all() and "1 of them skipped" in result.summary()

    result = train(lm, [*poisoned, EXAMPLES[0]], batch_size=1, watch=[], **options, **QUIET)
    hook.remove()
    assert len(result.skipped) == 1
    alone = new_model()
    train(alone, [EXAMPLES[0]], batch_size=1, **options, **QUIET)
    assert are_equal(weights_of(lm), weights_of(alone)), "the step after is as if it were the first"


def test_a_gradient_that_is_not_finite_changes_nothing(new_model):
    lm = new_model()
    weight = lm.model.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(True)
    hook = weight.register_hook(lambda gradient: gradient * torch.inf)
    weight.requires_grad_(False)
    before = weight_hash(lm.model)
    result = train(lm, EXAMPLES, batch_size=6, **QUIET)
    hook.remove()
    assert weight_hash(lm.model) == before
    assert "gradient of model.layers.1.mlp.up_proj.weight is" in result.steps["skipped"].iloc[0]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_killed_and_resumed_gives_the_weights_of_an_unbroken_run(new_model, tmp_path, objective):
    options = {
        "examples": PAIRS,
        "objective": objective,
        "batch_size": 2,
        "epochs": 3,
        "schedule": "cosine",
        "warmup_steps": 2,
        "save_every": 2,
        "proj_refresh": 3,
        **QUIET,
    }
    unbroken = new_model("qwen3_5")
    whole = train(unbroken, folder=tmp_path / "whole", **options)

    folder = tmp_path / "broken"
    killed = new_model("qwen3_5")
    killed_in_step(killed, 6, folder=folder, **options)
    assert json.loads((folder / "state.json").read_text())["step"] == 4
    killed_in_step(killed, 3, folder=folder, **options)  # in the 7th step, from weights of the 5th
    resumed = new_model("qwen3_5")
    rest = train(resumed, folder=folder, **options)
    assert are_equal(weights_of(resumed), weights_of(unbroken))
    assert rest.weights_after == whole.weights_after and rest.weights_before == whole.weights_before
    assert rest.steps.drop(columns="seconds").equals(whole.steps.drop(columns="seconds"))
    assert rest.log_probabilities.equals(whole.log_probabilities)
    assert rest.changes.equals(whole.changes)
    files = [{p.name for p in (tmp_path / run).iterdir()} for run in ("whole", "broken")]
    assert files[0] == files[1] >= {"run.json", "state.json", "metrics.jsonl", "step-000009"}


def test_killed_before_the_first_state_starts_anew(new_model, tmp_path):
    options = {"examples": EXAMPLES, "batch_size": 2, "folder": tmp_path / "run", **QUIET}
    killed = new_model()
    killed_in_step(killed, 2, **options)
    assert weight_hash(killed.model) != weight_hash(new_model().model)
    with pytest.raises(TrainingError, match="load the model again"):
        train(killed, **options)
    resumed, unbroken = new_model(), new_model()
    train(resumed, **options)
    train(unbroken, **options | {"folder": None})
    assert are_equal(weights_of(resumed), weights_of(unbroken))


def test_what_a_crash_left_half_written_is_not_taken_for_a_state(new_model, tmp_path):
    options = {"examples": EXAMPLES, "batch_size": 2, "save_every": 1, **QUIET}
    folder = tmp_path / "run"
    killed_in_step(new_model(), 3, folder=folder, **options)
    for leftover in ("step-000003", ".step-000003.unfinished"):
        (folder / leftover).mkdir()
        (folder / leftover / "weights.safetensors").write_bytes(b"half")
    resumed, unbroken = new_model(), new_model()
    train(resumed, folder=folder, **options)
    train(unbroken, **options)
    assert are_equal(weights_of(resumed), weights_of(unbroken))
    assert [p.name for p in folder.glob("*step-*")] == ["step-000003"]


def test_a_finished_run_is_loaded_and_not_run_again(new_model, tmp_path):
    options = {"examples": EXAMPLES, "batch_size": 2, "folder": tmp_path / "run", **QUIET}
    first = train(new_model(), **options)
    again = new_model()
    moved = weights_of(again)
    result = train(again, **options)
    assert weight_hash(again.model) == first.weights_after
    assert not are_equal(weights_of(again), moved)
    assert result.steps.equals(first.steps)


def test_another_run_in_the_same_folder_is_refused_with_both_values(new_model, tmp_path):
    lm = new_model()
    train(lm, EXAMPLES, batch_size=2, folder=tmp_path, **QUIET)
    before = weight_hash(lm.model)
    for options, said in [
        ({"rank": 8}, "'rank': '4'.* there, .*'rank': '8'"),
        ({"schedule": "linear"}, "schedule: constant there, linear now"),
        ({"batch_size": 3}, "batches: .* there, .* now"),
    ]:
        with pytest.raises(TrainingError, match=said):
            train(lm, EXAMPLES, folder=tmp_path, **{"batch_size": 2, **QUIET, **options})
    assert weight_hash(lm.model) == before


def test_a_state_of_another_model_or_a_damaged_one_is_refused(new_model, tmp_path):
    options = {"examples": EXAMPLES, "batch_size": 2, "save_every": 1, "folder": tmp_path}
    killed_in_step(new_model(), 3, **options, **QUIET)
    narrow = new_model(dtype=torch.bfloat16)
    before = weight_hash(narrow.model)
    with pytest.raises(ArtefactError, match=r"torch.float32.* there, .*torch.bfloat16"):
        train(narrow, **options, **QUIET)
    assert weight_hash(narrow.model) == before

    weights = next(tmp_path.glob("step-*")) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lm = new_model()
    before = weight_hash(lm.model)
    with pytest.raises(ArtefactError, match="damaged"):
        train(lm, **options, **QUIET)
    assert weight_hash(lm.model) == before
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_the_next_run_goes_on_from_what_the_optimizer_remembers(new_model, tmp_path):
    options = {"examples": EXAMPLES[:1], "batch_size": 1, **QUIET}
    unbroken, in_two, forgetful = new_model(), new_model(), new_model()
    train(unbroken, steps=5, **options)
    first = train(in_two, steps=2, folder=tmp_path / "first", **options)
    train(in_two, steps=3, optimizer_state=first.optimizer_state, **options)
    assert are_equal(weights_of(in_two), weights_of(unbroken))
    train(forgetful, steps=2, **options)
    train(forgetful, steps=3, **options)
    assert not are_equal(weights_of(forgetful), weights_of(unbroken))
    with pytest.raises(TrainingError, match="rank"):
        train(in_two, optimizer_state=first.optimizer_state, **options | {"rank": 2})
    slower = train(in_two, steps=1, optimizer_state=first.optimizer_state, **options | {"lr": 1e-7})
    assert slower.steps["lr"].tolist() == [1e-7], "its memory, not its settings"


def test_figures_of_every_step_are_there_as_json(new_model, tmp_path):
    result = train(new_model(), EXAMPLES, batch_size=2, folder=tmp_path, **QUIET)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["loss"] for record in records] == result.steps["loss"].tolist()
    assert records[0]["tokens"] > 0 and records[0]["skipped"] is None
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["format_version"] == 1 and run["setting"]["settings"]["rank"] == "4"


def test_tensorboard_gets_them_too(new_model, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(new_model(), EXAMPLES, batch_size=2, folder=tmp_path, **QUIET)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(scalar.step, scalar.value) for scalar in found.Scalars("loss")]
    assert [step for step, _ in scalars] == [1, 2, 3]
    assert [value for _, value in scalars] == pytest.approx(result.steps["loss"].tolist())


@pytest.mark.parametrize("interruption", [Killed, None])
def test_the_model_is_left_as_it_was_found(new_model, interruption):
    lm = new_model()
    lm.model.train()
    norm = lm.model.model.norm
    norm.eval().requires_grad_(True)
    norm.weight.grad = torch.ones_like(norm.weight)
    if interruption:
        killed_in_step(lm, 1, examples=EXAMPLES, **QUIET)
        norm.requires_grad_(True)  # which the helper takes away
    else:
        train(lm, EXAMPLES, **QUIET)
    wanted = [name for name, p in lm.model.named_parameters() if p.requires_grad]
    assert wanted == ["model.norm.weight"]
    assert lm.model.training and not norm.training
    assert torch.equal(norm.weight.grad, torch.ones_like(norm.weight))
    others = [p for p in lm.model.parameters() if p is not norm.weight]
    assert all(p.grad is None for p in others)


# What it refuses


def test_everything_that_is_wrong_is_named_at_once(new_model):
    lm = new_model()
    before = weight_hash(lm.model)
    with pytest.raises(TrainingError) as refused:
        train(
            lm,
            [EXAMPLES[0], Example((), (5,), None), Example((1,), (9999,), None)],
            objective="dpo",
            replay=[Example((2,), (), None)],
            batch_size=2,
            accumulate=3,
            epochs=0,
            clip=-1.0,
            schedule="exponential",
            step_in_backward=True,
            parameters=["*.q_proj.weight", "*.nothing"],
            texts=["Rain."],
            progress=False,
        )
    message = str(refused.value)
    for said in (
        "epochs is 0",
        "accumulate is 3, but a batch has 2",
        "clip is -1.0",
        "no schedule 'exponential'",
        "step_in_backward can neither clip nor accumulate",
        "examples: row 1 has one token and no context",
        "row 2 has token ids [9999]",
        "replay: row 0 has an empty continuation",
        "DPO compares, but examples [0, 1, 2] have no rejected_ids",
        "no parameter is called *.nothing",
        "a readout needs texts",
    ):
        assert said in message, said
    assert weight_hash(lm.model) == before


def test_half_precision_without_scaling_is_refused(new_model):
    with pytest.raises(TrainingError, match="dtype=torch.bfloat16"):
        train(new_model(dtype=torch.float16), EXAMPLES, progress=False)


def test_an_optimizer_that_cannot_do_it_is_refused(new_model, tmp_path):
    lm, options = new_model(), {"optimizer": torch.optim.AdamW, "progress": False}
    with pytest.raises(TrainingError, match="^AdamW cannot save its state"):
        train(lm, EXAMPLES, folder=tmp_path, **options)
    with pytest.raises(TrainingError, match="^AdamW cannot step in backward"):
        train(lm, EXAMPLES, step_in_backward=True, **options)
    with pytest.raises(TrainingError, match="AdamW takes other settings.*rank"):
        train(lm, EXAMPLES, rank=4, **options)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_no_examples_are_refused(new_model):
    with pytest.raises(TrainingError, match="no examples"):
        train(new_model(), [], progress=False)


# Other processes


RUN = """
import json, sys
from amygdala_lib import load_model
from amygdala_lib.models import weight_hash
from amygdala_lib.training import train
from amygdala_lib.training.examples import Example

lm = load_model("demo", device="cpu")
rows = json.loads(sys.argv[1])
examples = [Example(tuple(c), tuple(t), None) for c, t in rows]
folder = sys.argv[2] or None
train(lm, examples, batch_size=2, steps=40, folder=folder, save_every=3, lr=1e-4, progress=False)
print(weight_hash(lm.model))
"""


@pytest.mark.slow
def test_a_killed_process_resumed_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    rows = json.dumps([[e.context_ids, e.continuation_ids] for e in some_examples(9)])
    folder = tmp_path / "run"

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", RUN, rows, str(folder)],
            cwd=repository_root(),
            stdout=subprocess.PIPE,
            text=True,
        )

    process = start(folder)
    while not (folder / "state.json").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert json.loads((folder / "state.json").read_text())["step"] < 40
    resumed, _ = start(folder).communicate()
    unbroken, _ = start("").communicate()
    assert resumed == unbroken and len(resumed.strip()) == 16


def sharded_step(rank, folder, family, model):
    """What each of two processes does: its own example, then the step on its shard."""
    store = torch.distributed.FileStore(str(folder / f"store-{family}"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    lm = load_model(model, device="cpu")
    lm.model.requires_grad_(True)
    for layer in lm.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm.model, mesh=mesh)
    optimizer = Apollo(lm.model.named_parameters(), lr=1e-3, rank=4)
    for _ in range(2):
        example = EXAMPLES[1 + rank]
        frozen_context_loss(lm, example.context_ids, example.continuation_ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor().detach() for name, p in lm.model.named_parameters()}
    if rank == 0:
        torch.save(whole, folder / f"{family}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_two_processes_with_a_shard_each_take_the_step_of_one(
    family, model_folder, new_model, tmp_path
):
    torch.multiprocessing.spawn(sharded_step, (tmp_path, family, model_folder(family)), nprocs=2)
    lm = new_model(family)
    # The mean over both examples is what FSDP makes of the gradients of its processes.
    train(lm, EXAMPLES[1:3], batch_size=2, steps=2, watch=[], **QUIET)
    assert furthest(torch.load(tmp_path / f"{family}.pt"), weights_of(lm)) < 1e-5


# From the command line


@pytest.fixture
def amygdala(tmp_path, monkeypatch):
    """`amygdala train ...` with runs/ in a place of this test's own: the exit status."""
    monkeypatch.setattr(artefacts, "repository_root", lambda: tmp_path)
    parser = argparse.ArgumentParser()
    training.add_commands(parser.add_subparsers(required=True))

    def run(*arguments):
        parsed = parser.parse_args(["train", *map(str, arguments)])
        return parsed.function(parsed)

    return run


@pytest.fixture
def examples_file(tmp_path):
    rows = [
        {"context": "The kettle took its time,", "continuation": " and so did he."},
        {"context": "She counted the stairs", "continuation": " again!"},
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_dry_run_first_then_for_real(amygdala, examples_file, model_folder, tmp_path, capsys):
    out, model = tmp_path / "tuned", model_folder("qwen3")
    command = [examples_file, "--model", model, "--steps", 3, "--batch-size", 2, "--rank", 4]
    command += ["--lr", 0.001, "--run", "mine", "--out", out]
    assert amygdala(*command, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "continuation before" in said and "loss_change" in said
    assert "nothing was written" in said and not out.exists()
    assert not (tmp_path / "runs").exists()

    assert amygdala(*command) == 0
    said = capsys.readouterr().out
    assert "continuation after" in said and str(out) in said
    assert (tmp_path / "runs" / "mine" / "training" / "state.json").exists()
    assert weight_hash(load_model(out, device="cpu").model) in said
    with pytest.raises(AmygdalaError, match="tuned exists"):
        amygdala(*command)


def test_a_run_in_which_every_step_is_skipped_has_failed(
    amygdala, examples_file, new_model, tmp_path, capsys
):
    lm = new_model()
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(torch.nan)
    lm.model.save_pretrained(tmp_path / "broken")
    lm.tokenizer.save_pretrained(tmp_path / "broken")
    command = [examples_file, "--model", tmp_path / "broken", "--steps", 1, "--run", "mine"]
    assert amygdala(*command) == 1
    assert "1 of them skipped" in capsys.readouterr().out
