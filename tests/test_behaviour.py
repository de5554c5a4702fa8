"""A behaviour is read as it was written, and its direction found where there is one to be found."""

import copy
import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from amygdala_lib import Directions, Readout, load_model, steer
from amygdala_lib.artefacts import repository_root
from amygdala_lib.behaviour import (
    behaviour_directions,
    evaluate_behaviour,
    load_behaviour,
    log_probabilities,
    read_answers,
    rendered,
    steering_check,
)
from amygdala_lib.behaviour.direction import unit_difference
from amygdala_lib.behaviour.evaluation import WORDS, figures
from amygdala_lib.behaviour.steering import random_signs
from amygdala_lib.corpus import load_corpus
from amygdala_lib.errors import AmygdalaError, CorpusError, ModelError, SteeringError

NOUNS = ["oven", "bench", "harbour", "cellar", "attic", "street", "garden", "tower"]
NOUNS += ["kitchen", "barn", "quay", "chapel", "loft", "stable", "mill", "porch"]
POLES = {"warm": "says that it is warm", "cold": "says that it is cold"}
LISTENING = repository_root() / "corpus" / "behaviours" / "listening"


def pair(noun, **changes):
    return {
        "id": noun,
        "context": [{"person": f"How is the {noun} today?"}],
        "warm": f"The {noun} is warm, and we sit close to it.",
        "cold": f"The {noun} is cold, and we keep away from it.",
    } | changes


def mirror(noun):
    asked = [{"person": f"Say the other thing of the {noun}."}]
    return {"id": f"{noun}_again", "mirror_of": noun, "context": asked}


def files(**changes):
    """Six training pairs, eight held out, two controls: words tell their poles at once."""
    return {
        "behaviour": {"version": 1, "poles": POLES},
        "train": [pair(noun) for noun in NOUNS[:6]],
        "held_out": [pair(noun) for noun in NOUNS[6:14]],
        "control": [pair(noun) for noun in NOUNS[14:]],
    } | changes


def written(folder, **changes):
    folder.mkdir(exist_ok=True)
    for name, content in files(**changes).items():
        if content is not None:
            text = yaml.safe_dump(content, sort_keys=False)
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_behaviour(written(tmp_path_factory.mktemp("behaviours") / "warmth"))


@pytest.fixture(scope="module")
def listening():
    return load_behaviour(LISTENING)


@pytest.fixture
def lm(loaded):
    """A dense model, which is the faster: every family is read where that matters."""
    return loaded("qwen3")


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


def n_hooks(lm):
    modules = list(lm.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


# Reading the files


def test_what_is_written_is_what_is_loaded(toy):
    assert (toy.name, toy.poles) == ("warmth", POLES)
    assert [len(split) for split in (toy.train, toy.held_out, toy.control)] == [6, 8, 2]
    oven = toy.train[0]
    assert [(turn.role, turn.text) for turn in oven.context] == [
        ("person", "How is the oven today?")
    ]
    assert oven.answers[0] == "The oven is warm, and we sit close to it."
    assert oven.answers[1] == "The oven is cold, and we keep away from it."


def test_a_mirror_has_the_answers_of_its_pair_the_other_way_round(tmp_path):
    train = [mirror("oven"), pair("oven"), pair("bench")]
    again, oven, bench = load_behaviour(written(tmp_path / "b", train=train)).train
    assert again.answers == oven.answers[::-1]
    assert again.group == oven.group != bench.group
    assert again.context[0].text == "Say the other thing of the oven."


def test_controls_may_be_left_out(tmp_path):
    assert load_behaviour(written(tmp_path / "b", control=None)).control == []


def test_the_hash_follows_the_texts_and_not_the_folder(tmp_path, toy):
    assert load_behaviour(written(tmp_path / "elsewhere")).hash == toy.hash
    other = [pair(noun) for noun in NOUNS[:5]] + [pair(NOUNS[5], cold="The street is icy.")]
    assert load_behaviour(written(tmp_path / "b", train=other)).hash != toy.hash


def refusal(folder):
    with pytest.raises(CorpusError) as refused:
        load_behaviour(folder)
    return str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (pair("oven", warm=" "), "train.yaml, oven: warm is ' ': give a text"),
        (pair("oven", cold=7), "train.yaml, oven: cold is 7: give a text"),
        (pair("Oven"), "id is 'Oven': give a name in snake_case"),
        (pair("oven", warn="Yes."), "unknown field 'warn' (did you mean 'warm'?)"),
        (pair("oven", context=[]), "context is []"),
        (pair("oven", context="How?"), "context is 'How?'"),
        (pair("oven", context=[{"person": "How?", "assistant": "So."}]), "a turn is {'person'"),
        (
            pair("oven", context=[{"person": "How?"}, {"assistant": "So."}]),
            "turns of person, assistant: they alternate and end with a person's",
        ),
        (pair("oven", context=[{"user": "How?"}]), "turns of user: they alternate"),
        (mirror("bensh"), "mirror_of names 'bensh', which is no pair with answers in this file"),
        (mirror("quay"), "mirror_of names 'quay'"),  # in another file
        (pair("oven", mirror_of="bench"), "has mirror_of and answers too"),
        (pair("bench"), "bench: 2 pairs have this id"),
        (
            pair("oven", warm="It is so.", cold="It  is so."),
            "has a text of oven again: 'It is so.'",
        ),
        (pair("oven", warm=pair("quay")["warm"]), "quay: has a text of oven again"),
        ("oven", "train.yaml, pair 1: is 'oven': give id, context and warm, cold"),
    ],
)
def test_a_mistake_in_a_pair_is_named(tmp_path, wrong, said):
    train = [wrong, pair("bench"), pair("harbour")]
    assert said in refusal(written(tmp_path / "b", train=train))


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    folder = written(
        tmp_path / "b",
        train=[pair("oven", warm=""), pair("bench", context=None)],
        held_out=[pair("quay"), mirror("quay")],
        control={"quay": 1},
    )
    (folder / "heldout.yaml").write_text("[]")
    message = refusal(folder)
    assert "has 5 problem(s)" in message
    for said in (
        "oven: warm is ''",
        "bench: context is None",
        "held_out.yaml: 1 pairs besides mirrors, needs 2",
        "control.yaml: must be a list of pairs",
        "heldout.yaml: unexpected here (did you mean 'held_out.yaml'?)",
    ):
        assert said in message


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"version": 2, "poles": POLES}, "version is 2; this library reads `version: 1`"),
        ({"version": 1, "poles": {"warm": "it is"}}, "map two names in snake_case"),
        ({"version": 1, "poles": ["warm", "cold"]}, "map two names in snake_case"),
        ({"version": 1, "poles": {"warm": "it is", "id": "it is"}}, "map two names"),
        ({"version": 1, "poles": POLES, "name": "x"}, "unknown fields name"),
        ([], "version is None"),
        (None, "behaviour.yaml is missing"),
    ],
)
def test_poles_that_are_no_two_poles_are_refused(tmp_path, behaviour, said):
    assert said in refusal(written(tmp_path / "b", behaviour=behaviour))


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = written(tmp_path / "b")
    (folder / "train.yaml").write_text("- id: [", encoding="utf-8")
    (folder / "held_out.yaml").write_bytes(b"- id: \xff")
    (folder / "control.yaml").write_text("- id: a\n  id: b\n", encoding="utf-8")
    message = refusal(folder)
    assert "train.yaml cannot be read" in message
    assert "held_out.yaml cannot be read" in message
    assert "control.yaml cannot be read: 'id' is written twice" in message
    assert "no folder" in refusal(tmp_path / "nowhere")


# Rendering


def test_a_raw_conversation_is_paragraphs_with_names(tmp_path):
    turns = [{"person": "How is it?"}, {"assistant": "Warm."}, {"person": "Is it?"}]
    train = [pair("oven", context=turns), pair("bench")]
    oven = load_behaviour(written(tmp_path / "b", train=train)).train[0]
    before, after = rendered(oven.context, oven.answers[0])
    assert before == "Person: How is it?\n\nAssistant: Warm.\n\nPerson: Is it?\n\nAssistant:"
    assert after == " The oven is warm, and we sit close to it."


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %} {% endif %}"
)


@pytest.fixture(scope="module")
def chatting(loaded):
    """A model whose tokenizer adds a BOS by itself, and whose chat template writes one too."""
    lm = loaded("llama")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_a_chat_template_puts_the_answer_where_the_model_would_write_it(chatting, toy):
    before, after = rendered(toy.train[0].context, "Warm.", chatting.tokenizer)
    assert before + after == "<s>[user] How is the oven today?\n[assistant] Warm."


def test_without_a_chat_template_there_is_none_to_use(lm, toy):
    with pytest.raises(ModelError, match="no chat template: leave chat_template off"):
        behaviour_directions(lm, toy, [1], chat_template=True, progress=False)


# Reading the model


def own_tokens(lm, text, before, **options):
    """Ids, and which tokens make the text longer than the conversation was."""
    ids = lm.tokenizer(text, return_tensors="pt", **options)["input_ids"]
    skip = not options
    lengths = [
        len(lm.tokenizer.decode(ids[0, : i + 1], skip_special_tokens=skip))
        for i in range(ids.shape[1])
    ]
    return ids, torch.tensor([length > len(before) for length in lengths])


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_activations_are_those_of_the_answers_own_tokens(causal_lm, toy, pool):
    found = read_answers(causal_lm, toy.train[:2], [-1, 1], pool=pool, progress=False)
    norms = {-1: [], 1: []}
    for row, item in enumerate(toy.train[:2]):
        for column, answer in enumerate(item.answers):
            before, after = rendered(item.context, answer)
            ids, own = own_tokens(causal_lm, before + after, before)
            with torch.no_grad():
                states = causal_lm.model(input_ids=ids, output_hidden_states=True).hidden_states
            for layer in (-1, 1):
                tokens = states[layer + 1][0, own].double()
                expected = tokens.mean(0) if pool == "mean" else tokens[-1]
                assert torch.allclose(
                    found.values[layer][row, column].double(), expected, rtol=1e-4, atol=1e-5
                )
                norms[layer] += tokens.norm(dim=1).tolist()
    for layer, each in norms.items():
        assert found.norms[layer] == pytest.approx(np.mean(each), rel=1e-4)


def test_log_probabilities_are_the_loss_on_the_answer_alone(causal_lm, toy):
    found = log_probabilities(causal_lm, toy.train[:2])
    for row, item in enumerate(toy.train[:2]):
        for column, answer in enumerate(item.answers):
            before, after = rendered(item.context, answer)
            ids, own = own_tokens(causal_lm, before + after, before)
            with torch.no_grad():
                loss = causal_lm.model(input_ids=ids, labels=torch.where(own, ids, -100)).loss
            assert found[row, column] == pytest.approx(-loss.item(), rel=1e-4)


def test_a_chat_template_is_read_with_one_bos_and_nothing_after_the_answer(chatting, toy):
    (item,) = toy.train[:1]
    before, after = rendered(item.context, item.answers[0], chatting.tokenizer)
    ids, own = own_tokens(chatting, before + after, before, add_special_tokens=False)
    assert ids[0].tolist().count(chatting.tokenizer.bos_token_id) == 1
    with torch.no_grad():
        loss = chatting.model(input_ids=ids, labels=torch.where(own, ids, -100)).loss
    found = log_probabilities(chatting, [item], chat_template=True)
    assert found[0, 0] == pytest.approx(-loss.item(), rel=1e-4)
    assert found[0, 0] != pytest.approx(log_probabilities(chatting, [item])[0, 0], rel=1e-4)


def test_an_answer_that_does_not_fit_into_the_model_is_named(lm, tmp_path):
    train = [pair("oven", warm="word " * 300), pair("bench")]
    long = load_behaviour(written(tmp_path / "b", train=train))
    with pytest.raises(ModelError, match=r"oven has \d+ tokens, .* reads 256: shorten it"):
        behaviour_directions(lm, long, [1], progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"pool": "tokens"}, "no pool 'tokens'"), ({"layers": [9]}, r"no layers \[9\]")],
)
def test_what_a_model_does_not_have_is_refused(lm, toy, options, said):
    with pytest.raises(ModelError, match=said):
        behaviour_directions(lm, toy, progress=False, **options)


def test_a_model_that_does_not_write_has_no_log_probabilities(loaded, toy):
    with pytest.raises(ModelError, match="reads and does not write"):
        log_probabilities(loaded("bert"), toy.train)


# The direction


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_direction_is_the_mean_difference_at_unit_length(lm, tmp_path, pool):
    train = [pair("oven"), mirror("oven"), *(pair(noun) for noun in NOUNS[1:6])]
    behaviour = load_behaviour(written(tmp_path / "b", train=train))
    dirs = behaviour_directions(lm, behaviour, [1, 3], pool=pool, progress=False)
    values = read_answers(lm, behaviour.train, [1, 3], pool=pool, progress=False).values
    for layer in (1, 3):
        held = values[layer].double()
        mean = sum(first - second for first, second in held) / len(held)
        assert torch.allclose(dirs.vectors[layer][0].double(), mean / mean.norm(), atol=1e-5)
        projections = held.reshape(-1, lm.hidden_size) @ (mean / mean.norm())
        assert dirs.means[layer].item() == pytest.approx(projections.mean().item(), rel=1e-3)
        assert dirs.stds[layer].item() == pytest.approx(projections.std().item(), rel=1e-3)


def test_directions_steer_read_and_are_kept_as_all_others(lm, toy, tmp_path):
    dirs = behaviour_directions(lm, toy, [1], progress=False)
    kept = Directions.load(dirs.save(tmp_path / "readout"))
    assert kept.concepts == ["warm"]
    assert torch.equal(kept.vectors[1], dirs.vectors[1])
    assert kept.provenance["opposite"] == "cold"
    assert kept.provenance["corpus_hash"] == toy.hash
    warm, cold = read_answers(lm, toy.held_out, [1], progress=False).values[1].unbind(1)
    readout = Readout(kept)
    assert (readout.project(warm, 1) > readout.project(cold, 1)).all()
    plain = log_probabilities(lm, toy.held_out)
    with steer(lm, kept, {"warm": 1.0}):
        assert not np.allclose(log_probabilities(lm, toy.held_out), plain)
    assert np.array_equal(log_probabilities(lm, toy.held_out), plain)


def test_answers_that_end_alike_have_no_direction_at_the_last_embedding(lm, toy):
    with pytest.raises(AmygdalaError, match="do not differ at layer -1 with pool='last'"):
        behaviour_directions(lm, toy, [-1], pool="last", progress=False)


# Evaluation


@settings(max_examples=25)
@given(
    scores=arrays(
        np.float64, st.tuples(st.integers(2, 9), st.just(2)), elements=st.integers(-3, 3)
    ),
    data=st.data(),
)
def test_figures_are_those_of_counting_pairs(scores, data):
    groups = data.draw(arrays(np.int64, len(scores), elements=st.integers(0, 2)))
    groups = np.unique(groups, return_inverse=True)[1]
    row = figures(scores, groups, draws=50, seed=0)
    right = [(a > b) + (a == b) / 2 for a, b in scores]
    assert row["accuracy"] == pytest.approx(np.mean(right))
    is_first = np.tile([1, 0], len(scores))
    assert row["auroc"] == pytest.approx(roc_auc_score(is_first, scores.ravel()))
    shared = [r for r, g in zip(right, groups, strict=True) if (groups == g).sum() > 1]
    assert row["mirrored"] == pytest.approx(np.mean(shared) if shared else np.nan, nan_ok=True)
    for name in ("accuracy", "auroc"):
        assert row[f"{name}_low"] <= row[f"{name}_high"]
        assert 0 < row[f"{name}_p"] <= 1


def test_perfect_order_is_as_improbable_as_coins_make_it():
    scores = np.column_stack([np.ones(8), np.zeros(8)])
    row = figures(scores, np.arange(8), draws=20000, seed=0)
    assert (row["accuracy"], row["auroc"]) == (1, 1)
    assert row["accuracy_p"] == pytest.approx(2.0**-8, rel=0.3)
    together = figures(scores, np.repeat(np.arange(4), 2), draws=20000, seed=0)
    assert together["accuracy_p"] == pytest.approx(2.0**-4, rel=0.1), "a mirror is no second coin"


def test_a_score_of_the_answers_alone_is_no_evidence_on_mirrors():
    own = np.random.default_rng(0).normal(size=(6, 2))
    scores = np.stack([own, own[:, ::-1]], axis=1).reshape(-1, 2)
    row = figures(scores, np.repeat(np.arange(6), 2), draws=500, seed=0)
    assert (row["accuracy"], row["mirrored"], row["accuracy_p"]) == (0.5, 0.5, 1)
    assert (row["accuracy_low"], row["accuracy_high"]) == (0.5, 0.5)


def test_noise_is_seldom_taken_for_a_behaviour():
    rng = np.random.default_rng(0)
    groups = np.array([0, 0, 1, 2, 3, 3, *range(4, 12)])
    rows = [
        figures(rng.normal(size=(len(groups), 2)), groups, draws=99, seed=0) for _ in range(200)
    ]
    for name in ("accuracy_p", "auroc_p"):
        assert np.mean([row[name] <= 0.05 for row in rows]) < 0.09
        assert np.mean([row[name] <= 0.5 for row in rows]) > 0.3, "nor is everything accepted"


@pytest.fixture(scope="module")
def evaluated(loaded, toy):
    return evaluate_behaviour(loaded("qwen3"), toy, [1, 3], progress=False)


def test_a_difference_that_is_there_is_found_at_every_layer_and_by_words(evaluated):
    frame = evaluated.frame
    assert list(frame["layer"].dropna()) == [-1, 1, 3]
    assert (frame[["train_accuracy", "accuracy", "control"]] == 1).all(axis=None)
    assert (frame["auroc"] > 0.8).all()
    assert (frame["accuracy_p"] < 0.02).all()
    summary = evaluated.summary()
    assert "NOTHING IS SHOWN" in summary, "words tell as much"
    assert "in 100% of 2 conversations" in summary
    assert max(map(len, summary.splitlines())) <= 100


def test_held_out_pairs_have_no_say_in_the_direction_nor_in_the_layer(lm, tmp_path, evaluated):
    turned = [pair(noun, warm=pair(noun)["cold"], cold=pair(noun)["warm"]) for noun in NOUNS[6:14]]
    other = load_behaviour(written(tmp_path / "b", held_out=turned))
    found = evaluate_behaviour(lm, other, [1, 3], progress=False)
    assert found.layer == evaluated.layer
    assert (found.frame["train_accuracy"] == evaluated.frame["train_accuracy"]).all()
    assert (found.frame["accuracy"] == 0).all()
    assert (found.frame["accuracy_p"] == 1).all()


def test_training_accuracy_leaves_a_pair_out_with_its_mirrors(lm, tmp_path):
    rng = np.random.default_rng(1)
    train = [
        pair(noun, warm=" ".join(rng.permutation(NOUNS)), cold=" ".join(rng.permutation(NOUNS)))
        for noun in NOUNS[:6]
    ]
    behaviour = load_behaviour(
        written(tmp_path / "b", train=[*train, mirror("oven"), mirror("bench")])
    )
    found = evaluate_behaviour(lm, behaviour, [1], progress=False).frame["train_accuracy"].iloc[1]
    values = read_answers(lm, behaviour.train, [1], progress=False).values[1].double()
    right = []
    for item, (first, second) in zip(behaviour.train, values, strict=True):
        others = [
            a - b
            for (a, b), other in zip(values, behaviour.train, strict=True)
            if other.group != item.group
        ]
        right.append(((first - second) @ sum(others) > 0).item())
    assert found == np.mean(right)
    assert 0 < found < 1, "neither rule would tell"


def test_words_and_embeddings_are_right_on_half_of_the_mirrors_exactly(lm, tmp_path):
    held_out = [entry for noun in NOUNS[6:9] for entry in (pair(noun), mirror(noun))]
    behaviour = load_behaviour(written(tmp_path / "b", held_out=held_out))
    frame = evaluate_behaviour(lm, behaviour, [3], progress=False).frame
    for reader in ("embeddings", WORDS):
        assert frame.loc[reader, "mirrored"] == frame.loc[reader, "accuracy"] == 0.5
        assert frame.loc[reader, "accuracy_p"] == 1


def test_the_same_seed_gives_the_same_figures_and_nobody_elses_dice_are_touched(lm, toy, evaluated):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = evaluate_behaviour(lm, toy, [1, 3], progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert again.frame.equals(evaluated.frame)


# Steering


@pytest.fixture(scope="module")
def fear(tmp_path_factory):
    """A behaviour that the bundled model knows: to be afraid rather than calm, in its own world."""
    world = load_corpus("affect_world")
    told = {
        state: [world.texts[row] for row in world.positives(state)] for state in ("afraid", "calm")
    }
    pairs = [
        {
            "id": f"story_{number}",
            "context": [{"person": f"What is story {number}?"}],
            "afraid": afraid,
            "calm": calm,
        }
        for number, (afraid, calm) in enumerate(zip(*told.values(), strict=False))
    ]
    poles = {"afraid": "is afraid", "calm": "is calm"}
    return load_behaviour(
        written(
            tmp_path_factory.mktemp("behaviours") / "fear",
            behaviour={"version": 1, "poles": poles},
            train=pairs[:16],
            held_out=pairs[16:24],
            control=None,
        )
    )


@pytest.mark.slow
def test_a_behaviour_that_the_bundled_model_knows_can_be_steered(demo, fear):
    dirs = behaviour_directions(demo, fear, [2], progress=False)
    checked = steering_check(demo, fear, dirs, [-0.3, 0, 0.3], random_deals=4, progress=False)
    own = checked.frame[checked.frame["direction"] == "behaviour"]
    assert own["preference"].is_monotonic_increasing
    slopes = checked.slopes()
    assert slopes["behaviour"] > 1.5 * slopes.drop("behaviour").abs().max()
    assert "Steering turns it toward afraid, more than any of 4 random deals." in checked.summary()


def test_every_strength_is_what_steering_by_hand_gives(lm, toy):
    dirs = behaviour_directions(lm, toy, [1, 3], progress=False)
    checked = steering_check(lm, toy, dirs, [0.5, -1], layers=[3], random_deals=1, progress=False)
    frame = checked.frame
    assert list(frame["strength"][:2]) == [-1, 0.5]
    for row in frame[frame["direction"] == "behaviour"].itertuples():
        with steer(lm, dirs, {"warm": row.strength}, layers=[3]):
            found = log_probabilities(lm, toy.of(row.split))
        assert row.preference == pytest.approx((found[:, 0] - found[:, 1]).mean())
        assert row.preference_low <= row.preference <= row.preference_high
    assert set(frame["split"]) == {"held_out", "control"}
    assert "Control, where the first answer is wrong" in checked.summary()
    unsteered = log_probabilities(lm, toy.held_out)
    with_zero = steering_check(lm, toy, dirs, [0, 1], layers=[3], random_deals=1, progress=False)
    at_zero = with_zero.frame.query("strength == 0 and split == 'held_out'")
    assert list(at_zero["direction"]) == ["behaviour", "dealt 1"]
    assert (at_zero["preference"] == (unsteered[:, 0] - unsteered[:, 1]).mean()).all()
    assert (at_zero["warm"] == unsteered[:, 0].mean()).all()
    assert max(map(len, checked.summary().splitlines())) <= 100


def test_a_random_deal_swaps_half_of_the_pairs_and_mirrors_with_theirs():
    groups = np.array([0, 0, 1, 2, 3, 4, 4, 5])
    deals = random_signs(groups, 50, seed=0)
    assert deals.abs().unique().tolist() == [1]
    for deal in deals.numpy():
        assert sum(deal[np.flatnonzero(groups == group)[0]] for group in range(6)) == 0
        assert deal[0] == deal[1] and deal[5] == deal[6]
    assert len(deals.unique(dim=0)) > 15, "of the 20 there are"
    assert torch.equal(deals, random_signs(groups, 50, seed=0))
    assert not torch.equal(deals, random_signs(groups, 50, seed=1))


def test_a_random_deal_loses_what_the_poles_have_in_common():
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.zeros(64), torch.randn(32, 64, generator=generator)
    shared[0] = 2
    values = torch.stack([shared + own, torch.zeros(32, 64)], dim=1)
    assert unit_difference(values)[0, 0] > 0.8
    cosines = [unit_difference(values, d)[0, 0].abs() for d in random_signs(np.arange(32), 20, 0)]
    assert max(cosines) < 0.4


def test_what_cannot_be_compared_is_refused_at_once_and_no_hook_stays(lm, toy, fear):
    dirs, hooks = behaviour_directions(lm, toy, [1], progress=False), n_hooks(lm)
    with pytest.raises(SteeringError) as refused:
        steering_check(lm, fear, dirs, [0.5, 0.5], random_deals=0, progress=False)
    message = str(refused.value)
    assert "directions of warm were not made from this state of fear" in message
    assert "strengths are [0.5]: a curve needs two or more" in message
    assert "random_deals is 0" in message
    for strengths, layers in (([0, np.nan], None), ([0, 1], [3])):
        with pytest.raises(AmygdalaError):
            steering_check(lm, toy, dirs, strengths, layers=layers, progress=False)
    assert n_hooks(lm) == hooks


# The texts of corpus/behaviours/listening


def test_listening_has_the_pairs_it_says(listening):
    answered = {
        split: sum(pair.mirror_of is None for pair in listening.of(split))
        for split in ("train", "held_out", "control")
    }
    assert answered == {"train": 32, "held_out": 12, "control": 6}
    assert list(listening.poles) == ["takes_direction", "offers_alternatives"]
    assert "10 of them mirrors" in listening.summary()


def answers(behaviour):
    return [pair.answers for pair in behaviour.train + behaviour.held_out if pair.mirror_of is None]


def test_the_two_kinds_of_answer_are_equally_long_and_end_alike(listening):
    ratios = [np.log(len(takes) / len(offers)) for takes, offers in answers(listening)]
    assert abs(np.mean(ratios)) < 0.03
    assert max(map(abs, ratios)) < np.log(1.4)
    assert 0.35 < np.mean(np.array(ratios) > 0) < 0.65
    for pair in listening.pairs:
        takes, offers = pair.answers
        assert takes[-1] == offers[-1], pair.id


def test_no_kind_of_answer_has_an_opening_or_a_turn_of_phrase_of_its_own(listening):
    for kind in zip(*answers(listening), strict=True):
        openings = Counter(" ".join(answer.split()[:2]).lower() for answer in kind)
        assert max(openings.values()) <= 3
        assert 8 <= sum("?" in answer for answer in kind) <= 20
        assert sum(bool(re.search(r"\b(could|would)\b", answer)) for answer in kind) >= 10


def test_no_text_of_listening_stands_in_both_halves(listening):
    def sequences(pairs):
        texts = [t for p in pairs for t in (*p.answers, *(turn.text for turn in p.context))]
        words = [re.findall(r"\w+", text.lower()) for text in texts]
        return {tuple(w[i : i + 8]) for w in words for i in range(len(w) - 7)}

    others = listening.held_out + listening.control
    assert not sequences(listening.train) & sequences(others)


def test_listening_is_typed_in_plain_marks(listening):
    for item in listening.pairs:
        for text in (*item.answers, *(turn.text for turn in item.context)):
            assert not set(text) & set("\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u00a0"), item.id


@pytest.mark.slow
def test_words_do_not_give_listening_away_and_the_bundled_model_does_not_know_it(demo, listening):
    found = evaluate_behaviour(demo, listening, [2, 4, 6], progress=False)
    words = found.frame.loc[WORDS]
    assert words["accuracy"] <= 0.65
    assert words["train_accuracy"] <= 0.65
    assert found.frame.loc["embeddings", "mirrored"] == 0.5
    of_layers = found.frame.drop(index=WORDS)
    assert of_layers["accuracy"].max() < 0.85, "sixteen coins do as well once in a hundred"
    assert of_layers["mirrored"].max() < 0.9
