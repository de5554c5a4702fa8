"""The grammar behind the bundled model: it can score what it writes; what is held out stays out."""

import random
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from amygdala_lib.artefacts import repository_root
from amygdala_lib.demo.affect_world import KINDS, AffectWorld, split_sentences

world = AffectWorld()
splits = st.sampled_from(["train", "validation", "test"])
seeds = st.integers(0, 2**32)


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from(world.states), splits, splits)
def test_every_sentence_of_a_story_is_read_back_as_what_it_is(seed, state, split, cue_split):
    story = world.story(random.Random(seed), state, split, cue_split=cue_split, turns=0.3)
    read = world.read(story.text)
    assert [s.text for s in read] == [s.text for s in story.sentences]
    for found, told in zip(read, story.sentences, strict=True):
        assert found.role == told.role
        if told.role == "cue":
            assert found.state == told.state


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(world.states))
def test_a_direct_text_names_its_state_once_and_stays_in_it(seed, state):
    read = world.read(world.direct(random.Random(seed), state).text)
    assert [s.state for s in read if s.role == "anchor"] == [state]
    assert {s.state for s in read if s.role == "cue"} <= {state}


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(world.states), splits)
def test_stories_never_name_their_state(seed, state, split):
    stem = re.compile(rf"\b{state[:5]}", re.IGNORECASE)
    assert not stem.search(world.story(random.Random(seed), state, split, turns=0).text)


@settings(max_examples=50, deadline=None)
@given(seeds, st.sampled_from(world.states), splits)
def test_a_story_says_nothing_twice(seed, state, split):
    texts = [s.text for s in world.story(random.Random(seed), state, split).sentences]
    assert len(set(texts)) == len(texts)


def test_the_same_seed_writes_the_same_story():
    stories = {world.story(random.Random(3), "calm").text for _ in range(3)}
    assert len(stories) == 1


def test_half_of_a_story_is_cues_after_the_opening():
    rng = random.Random(0)
    body = [s for _ in range(500) for s in world.story(rng, "sad", turns=0).sentences[1:]]
    share = sum(s.role == "cue" for s in body) / len(body)
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("kind", [*KINDS, "manner"])
def test_held_out_frames_and_phrases_are_not_in_training(kind):
    def spelled(templates):
        from amygdala_lib.demo.affect_world import _expand

        return {text for t in templates for p in ("she", "i") for text in _expand(t, p)}

    entries = [entry[kind] for entry in world.grammar["states"].values()]
    for group in [*entries, world.grammar["frames"].get(kind)]:
        if group:
            train, validation, test = (spelled(group[s]) for s in ("train", "validation", "test"))
            assert not train & (validation | test) and not validation & test


def test_names_and_places_are_held_out():
    for group in (*world.grammar["names"].values(), world.grammar["places"]):
        train, validation, test = (set(group[s]) for s in ("train", "validation", "test"))
        assert not train & (validation | test) and not validation & test


@pytest.mark.parametrize(
    "sentence",
    [
        "Her hands shook the.",
        "Her hands shook",
        "her hands shook.",
        "Her knees shone.",
        "her knees shook.",
        "Trembling, she danced around the table.",
        "I feel purple.",
        "He said, “Lock it, quick.”",
        "",
    ],
)
def test_what_the_grammar_cannot_write_is_not_recognised(sentence):
    assert world.classify(sentence) is None


def test_a_changed_word_is_noticed():
    rng = random.Random(0)
    for _ in range(200):
        cue = world.cue(rng, rng.choice(world.states), world.narrator(rng)).text
        words = cue.split(" ")
        words[rng.randrange(len(words))] = "xylophone"
        assert world.classify(" ".join(words)) is None


def test_a_spoken_question_does_not_end_its_sentence():
    told = [
        '"Where does this wire lead?" I said.',
        'I said, "Show me how it works."',
        "It was Tuesday.",
    ]
    assert split_sentences(" ".join(told)) == told


def test_an_unfinished_sentence_is_left_out():
    assert split_sentences("It was Tuesday. The wind came from") == ["It was Tuesday."]


def test_states_are_concepts_of_the_corpus_with_the_same_signs():
    manifest = yaml.safe_load((repository_root() / "corpus" / "manifest.yaml").read_text())
    assert len(world.states) >= 16
    for state, entry in world.grammar["states"].items():
        concept = manifest["concepts"][state]
        for axis in ("valence", "arousal"):
            assert entry[axis] * concept[axis] >= 0, f"{state}: {axis} points the other way"


def test_as_a_corpus_it_is_labelled_and_its_test_stories_are_held_out():
    corpus = world.corpus(per_state=3)
    assert corpus.concepts == world.states
    assert (
        corpus.counts()["total"] == 3
    ).all() and f"{len(world.states)} concepts" in corpus.summary()
    assert len(corpus.heldout) == 3 * len(world.states)
    assert not {text.text for text in corpus.heldout} & set(corpus.texts)
    assert world.corpus(per_state=3).hash == corpus.hash != world.corpus(per_state=3, seed=2).hash
