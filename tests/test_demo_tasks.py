"""What the bundled model is taught in the notebooks, and how what it writes is scored."""

import math
import random

import numpy as np
import pytest
import torch

from amygdala_lib import load_model
from amygdala_lib.demo.affect_world import AffectWorld
from amygdala_lib.demo.evaluate import cue_share, openings
from amygdala_lib.demo.tasks import begun, log_likelihood, own_pairs, story_examples, told


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def world():
    return AffectWorld()


def text_of(demo, ids):
    return demo.tokenizer.decode(ids)


def test_a_story_is_its_opening_and_how_it_goes_on(demo, world):
    examples = story_examples(demo, world, ["calm", "afraid"], 6)
    for number, example in enumerate(examples):
        (opening,) = world.read(text_of(demo, example.context_ids))
        sentences = world.read(text_of(demo, example.continuation_ids))
        assert opening.role == "opening" and None not in sentences
        cues = {sentence.state for sentence in sentences if sentence.role == "cue"}
        assert cues <= {("calm", "afraid")[number % 2]}
        assert "anchor" not in {sentence.role for sentence in sentences}


def test_a_named_story_says_its_state_once(demo, world):
    for example in story_examples(demo, world, ["calm"], 4, named=True):
        roles = [s.role for s in world.read(text_of(demo, example.continuation_ids))]
        assert roles.count("anchor") == 1 and roles[1] == "anchor"
        assert "calm" in text_of(demo, example.continuation_ids)


def test_stories_depend_on_their_seed_alone(demo, world):
    random.seed(0)
    first = story_examples(demo, world, ["calm"], 3, seed=1)
    assert first == story_examples(demo, world, ["calm"], 3, seed=1)
    assert first != story_examples(demo, world, ["calm"], 3, seed=2)


def test_held_out_stories_are_in_places_training_never_showed(world):
    nouns = {place.split("the ")[-1] for place in world.grammar["places"]["test"]}
    prompts = begun(world, "sad", 5)
    assert prompts == begun(world, "sad", 5) != begun(world, "sad", 5, seed=1)
    for prompt in prompts:
        sentences = world.read(prompt)
        assert [sentence.role for sentence in sentences] == ["opening", "cue", "neutral"]
        assert sentences[1].state == "sad"
        assert any(noun in sentences[0].text for noun in nouns)


def test_texts_are_scored_by_the_grammar(world):
    rng = random.Random(0)
    narrator = world.narrator(rng)
    calm, sad = (world.cue(rng, state, narrator).text for state in ("calm", "sad"))
    neutral = world.neutral(rng, narrator, next(iter(world.grammar["places"]["train"]))).text
    turned = world.story(rng, "calm", turns=1).sentences
    turn = next(sentence.text for sentence in turned if sentence.role == "turn")
    texts = [
        f"{calm} {sad}",
        f"{neutral} I feel calm.",
        f"{calm} {turn} {sad}",
        f"{calm} Green ideas sleep.",
        "unfin",
    ]
    found = told(world, texts, {"calm"})
    assert found["share"].to_list() == pytest.approx([0.5, math.nan, 1, 1, math.nan], nan_ok=True)
    assert found["named"].to_list() == [0, 1, 0, 0, 0]
    assert found["ungrammatical"].to_list() == pytest.approx([0, 0, 0, 0.5, math.nan], nan_ok=True)
    assert told(world, texts, {"calm", "sad"})["share"][0] == 1
    np.testing.assert_equal(found["share"].to_numpy(), cue_share(world, texts, "calm"))


def test_no_texts_have_no_rows_but_their_columns(world):
    assert list(told(world, [], {"calm"}).columns) == ["share", "named", "ungrammatical"]


@pytest.mark.slow
def test_pairs_are_the_models_own_and_the_grammar_tells_them_apart(demo, world):
    pleasant = {s for s, entry in world.grammar["states"].items() if entry["valence"] > 0}
    first = openings(world, "train", 3, seed=1)
    pairs, shares = own_pairs(demo, world, first, pleasant, samples=6, new_tokens=20)
    assert 1 <= len(pairs) <= 6 and len(shares) == 18
    for pair in pairs:
        assert text_of(demo, pair.context_ids) in first
        assert len(pair.continuation_ids) <= 20
        good, bad = (text_of(demo, ids) for ids in (pair.continuation_ids, pair.rejected_ids))
        assert told(world, [good, bad], pleasant)["share"].to_list() == [1, 0]
    again, _ = own_pairs(demo, world, first, pleasant, samples=6, new_tokens=20)
    assert again == pairs
    fewer, _ = own_pairs(demo, world, first, pleasant, samples=6, new_tokens=20, each=1)
    assert {pair.context_ids for pair in fewer} == {pair.context_ids for pair in pairs}
    assert len(fewer) == len({pair.context_ids for pair in pairs})


def test_the_likelihood_is_that_of_a_full_pass(demo, world):
    examples = story_examples(demo, world, ["calm", "angry"], 3)
    found = log_likelihood(demo, examples)
    for example, value in zip(examples, found, strict=True):
        ids = torch.tensor([example.context_ids + example.continuation_ids])
        with torch.no_grad():
            logits = demo.model(input_ids=ids, use_cache=False).logits[0].double()
        before = len(example.context_ids)
        log_probs = logits[before - 1 : -1].log_softmax(-1)
        each = log_probs.gather(1, ids[0, before:, None])
        assert value == pytest.approx(each.mean().item(), abs=1e-4)
