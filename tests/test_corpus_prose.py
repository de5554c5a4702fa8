"""What a writer is told about prose; and this repository's own corpus against it."""

import re
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from amygdala_lib.artefacts import repository_root
from amygdala_lib.cli import main
from amygdala_lib.corpus import load_corpus
from amygdala_lib.corpus_files import Concept, CorpusFiles
from amygdala_lib.corpus_prose import check_prose, family_uses, narrator, short_of_aim, words_of

CONCEPT = {"gloss": "a", "cluster": "c", "sources": ["s"], "valence": 0, "arousal": 0, "near": []}
CORPUS = repository_root() / "corpus"
_WORDS = [
    "alder",
    "basalt",
    "copper",
    "drizzle",
    "ember",
    "fathom",
    "gravel",
    "hazel",
    "iron",
    "juniper",
    "kelp",
    "lantern",
]


def prose(number: int, seed: int = 0) -> str:
    """So many words of no meaning, no three of them in the same order for two seeds."""
    return " ".join(f"{_WORDS[(i * (seed + 1)) % 12]}{chr(97 + seed)}{i}x" for i in range(number))


def spelled(number: int, seed: int = 0) -> str:
    return re.sub(r"\d", lambda match: "abcdefghij"[int(match[0])], prose(number, seed))


@pytest.fixture
def checked(tmp_path):
    def check(files: dict[str, str], **concepts: dict):
        names = {name: {**CONCEPT, **fields} for name, fields in concepts.items()}
        manifest = {"version": 1, "clusters": {"c": "all"}, "concepts": names}
        for path, text in {"manifest.yaml": yaml.safe_dump(manifest), **files}.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return check_prose(tmp_path)

    return check


@pytest.mark.parametrize(
    ("name", "family", "text", "used"),
    [
        ("calm", (), "Calmly, in the calmness of a calmed sea", ["calmly", "calmness", "calmed"]),
        ("proud", ("pride",), "He prided himself.", ["prided"]),
        ("proud", (), "He prided himself.", []),
        ("at_ease", (), "At ease: easing at last, he put us at ease.", ["at ease", "at ease"]),
        ("on_edge", (), "He stood on the edge, on edges, on-edge.", ["on edges", "on edge"]),
        ("sad", (), "The sadhu's saddle was sad's own.", ["sad's"]),
        ("grief_stricken", ("grief",), "Grief. Grief-stricken.", ["grief", "grief stricken"]),
    ],
)
def test_a_word_of_the_family_is_found_inflected_or_not(name, family, text, used):
    concept = Concept(name, "g", "c", ("s",), 0, 0, (), family)
    assert family_uses(concept, text)[: len(used)] == used
    assert bool(family_uses(concept, text)) == bool(used)


def test_a_story_may_not_name_its_state_and_a_direct_text_once(checked):
    found = checked(
        {
            "stories/calm.txt": f"Calmly {spelled(60)}\n\n{spelled(60, 1)}",
            "direct/calm.txt": f"I feel calm {spelled(40, 2)}\n\nCalm, calmly {spelled(40, 3)}",
        },
        calm={},
    )
    assert [problem.split(":")[0] for problem in found.problems] == [
        "stories/calm.txt, text 1",
        "direct/calm.txt, text 2",
    ]
    assert "names its state (calmly)" in found.problems[0]


@pytest.mark.parametrize(
    ("path", "number", "right"),
    [
        ("stories/calm.txt", 49, False),
        ("stories/calm.txt", 50, True),
        ("stories/calm.txt", 151, False),
        ("direct/calm.txt", 29, False),
        ("direct/calm.txt", 80, True),
        ("heldout/negated/calm.txt", 91, False),
        ("neutral/geology.txt", 400, True),
    ],
)
def test_lengths(checked, path, number, right):
    problems = checked({path: spelled(number)}, calm={}).problems
    assert (problems == []) == right
    assert right or f"{number} words" in problems[0]


def test_shared_words_and_near_copies_are_found_across_the_whole_corpus(checked):
    shared = spelled(8, 5)
    copied = spelled(60, 6)
    found = checked(
        {
            "stories/calm.txt": f"{spelled(50, 1)} {shared}",
            "heldout/direct/sad.txt": f"{shared} {spelled(40, 2)}",
            "stories/sad.txt": copied,
            "neutral/geology.txt": copied.replace("alder", "elder").replace("iron", "tin"),
        },
        calm={},
        sad={},
    )
    assert len(found.problems) == 2
    assert "stories/calm.txt, text 1" in found.problems[0] and shared in found.problems[0]
    assert "nearly the same" in found.problems[1] and "neutral/geology.txt" in found.problems[1]


def test_tellings_of_one_scenario_may_share_their_words(checked):
    telling = spelled(60)
    assert not checked(
        {
            "paired/the_train/baseline.txt": telling,
            "paired/the_train/calm.txt": f"{telling} slowly",
        },
        calm={},
    ).problems


def test_a_beginning_is_used_six_times_and_not_more(checked):
    def texts(number):
        return "\n\n".join(f"Then the van came up {spelled(50, seed)}" for seed in range(number))

    assert not checked({"stories/calm.txt": texts(6)}, calm={}).problems
    found = checked({"stories/calm.txt": texts(7)}, calm={})
    assert found.problems == ['7 texts begin "then the van came up"; 6 at most']
    assert '7 "then the van came up"' in found.report()


@pytest.mark.parametrize(
    ("text", "person"),
    [
        ("I'd gone down.", "first"),
        ('"I am late," said Ruth.', "third"),
        ("You wait, and your hands wait.", "second"),
        ("The mime waits.", "third"),
    ],
)
def test_the_narrator_is_told_by_the_pronouns_outside_of_speech(text, person):
    assert narrator(text) == person


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_any_text_has_words_and_a_narrator(text):
    assert all(word == word.lower() for word in words_of(text))
    assert narrator(text) in ("first", "second", "third")


def test_the_command_fails_on_bad_prose_and_says_where(tmp_path, capsys, checked):
    checked({"stories/calm.txt": f"Calm {spelled(60)}\n\n{spelled(60, 1)}"}, calm={})
    assert main(["corpus", "check", str(tmp_path)]) == 1
    assert "names its state" in capsys.readouterr().out


# This repository's corpus


@pytest.fixture(scope="module")
def own_files():
    return CorpusFiles(CORPUS)


def test_the_corpus_is_clean():
    assert check_prose(CORPUS).problems == []


def test_every_concept_has_its_texts(own_files):
    assert len(own_files.manifest) >= 260
    short = short_of_aim(own_files.manifest, own_files.texts)
    assert {folder: names for folder, names in short.items() if names} == {}


def test_the_emotion_words_of_sofroniew_are_all_there(own_files):
    listed = [c for c in own_files.manifest.values() if "sofroniew2026" in c.sources]
    own = [c for c in own_files.manifest.values() if "amygdala" in c.sources]
    assert len(listed) == 171 and len(own) >= 28


def test_neighbours_are_mutual(own_files):
    manifest = own_files.manifest
    one_sided = [
        (name, other)
        for name, concept in manifest.items()
        for other in concept.near
        if name not in manifest[other].near
    ]
    assert one_sided == []


def test_scenarios_cover_every_cluster_twice_and_have_four_framings(own_files):
    framings: dict[str, set[str]] = {}
    for text in own_files.entries:
        if text.scenario and text.concept:
            framings.setdefault(text.scenario, set()).add(text.concept)
    assert len(framings) >= 23
    assert [name for name, told in framings.items() if not 4 <= len(told) <= 7] == []
    covered = Counter(
        cluster
        for told in framings.values()
        for cluster in {own_files.manifest[concept].cluster for concept in told}
    )
    clusters = {concept.cluster for concept in own_files.manifest.values()}
    assert [cluster for cluster in clusters if covered[cluster] < 2] == []


def test_hard_negatives_of_sixty_concepts_and_sixty_neutral_texts():
    corpus = load_corpus(CORPUS)
    kinds = Counter((text.concept, text.kind) for text in corpus.hard_negatives)
    complete = [
        name
        for name in corpus.concepts
        if all(kinds[name, kind] for kind in ("negated", "mentioned", "observed"))
    ]
    assert len(complete) >= 60 and len(corpus.neutral) >= 60
