"""A corpus folder either loads with the labels its files state, or says all that is wrong."""

import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from amygdala_lib.corpus import load_corpus, preflight
from amygdala_lib.errors import CorpusError

CLUSTERS = {"peace": "little stirs", "threat": "something is coming"}
FIELDS = {
    "gloss": "a line",
    "cluster": "peace",
    "sources": ["by hand"],
    "valence": 0.5,
    "arousal": -0.5,
    "near": [],
}


def manifest_of(*names, **changes):
    """A right manifest of these concepts; `changes` maps a concept to other fields."""
    concepts = {name: {**FIELDS, **changes.get(name, {})} for name in names}
    return yaml.safe_dump(
        {"version": 1, "clusters": CLUSTERS, "concepts": concepts}, sort_keys=False
    )


GOOD = {
    "manifest.yaml": manifest_of("calm", "afraid", afraid={"cluster": "threat"}),
    "stories/calm.txt": "The kettle took its time.\n\nHe let the phone ring out.",
    "stories/afraid.txt": "She counted the stairs again.\n\nThe latch, and then nothing.",
    "direct/calm.txt": "I feel calm. My hands lie where I left them.",
    "direct/_baseline.txt": "The shop opens at nine.\n\nThe bus has two doors.",
    "paired/the_commute/baseline.txt": "The train stops twice.\n\nThe train is a red one.",
    "paired/the_commute/afraid.txt": "The train stops, why?\n\nThe train is a red one, locked.",
    "neutral/geology.txt": "Basalt is dark.\n\nGranite is pale.",
    "heldout/direct/calm.txt": "There is no hurry in me.",
    "heldout/direct/_hard.txt": "The calm sea index fell.",
}

BASELINE, FRAMING = "paired/the_commute/baseline.txt", "paired/the_commute/afraid.txt"


def write(root: Path, files: dict) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def build(tmp_path):
    """Write the good corpus with some files replaced, or removed where None is given."""

    def build_corpus(changes: dict | None = None) -> Path:
        files = {**GOOD, **(changes or {})}
        return write(tmp_path / "c", {k: v for k, v in files.items() if v is not None})

    return build_corpus


def rows_of(corpus, *texts):
    return [corpus.texts.index(text) for text in texts]


# What a good corpus gives


def test_labels_follow_from_folder_and_file_name(build):
    corpus = load_corpus(build())
    labels = {(e.path, e.kind, e.concept, e.scenario, e.version): e.text for e in corpus.entries}
    commute = "paired/the_commute/"
    assert corpus.concepts == ["calm", "afraid"]
    assert labels[f"{commute}afraid.txt", "paired", "afraid", "the_commute", 1] == (
        "The train is a red one, locked."
    )
    assert labels[f"{commute}baseline.txt", "paired", None, "the_commute", 1] == (
        "The train is a red one."
    )
    assert ("direct/_baseline.txt", "direct", None, None, None) in labels
    assert ("stories/calm.txt", "story", "calm", None, None) in labels
    assert corpus.neutral == ["Basalt is dark.", "Granite is pale."]
    assert [(t.concept, t.kind) for t in corpus.heldout] == [(None, "direct"), ("calm", "direct")]
    assert corpus.manifest["afraid"].cluster == "threat"
    assert corpus.manifest["calm"].sources == ("by hand",)


def test_positives_are_all_texts_of_the_concept_and_negatives_all_others(build):
    corpus = load_corpus(build())
    assert list(corpus.positives("calm")) == rows_of(
        corpus,
        "The kettle took its time.",
        "He let the phone ring out.",
        "I feel calm. My hands lie where I left them.",
    )
    assert {corpus.texts[row] for row in corpus.negatives("calm")} == {
        "She counted the stairs again.",
        "The latch, and then nothing.",
        "The shop opens at nine.",
        "The bus has two doors.",
        "The train stops twice.",
        "The train is a red one.",
        "The train stops, why?",
        "The train is a red one, locked.",
    }
    assert not {"Basalt is dark.", "There is no hurry in me."} & set(corpus.texts)


def test_a_text_that_occurs_twice_is_run_once(build):
    again = "The kettle  took\nits time.\n\nIt rained, and that was all."
    corpus = load_corpus(build({"direct/calm.txt": again}))
    assert sum("kettle" in text for text in corpus.texts) == 1
    assert len(corpus.positives("calm")) == 3
    assert all(entry.text in corpus.texts for entry in corpus.entries)
    assert corpus.counts().loc["calm", ["story", "direct", "total"]].tolist() == [2, 2, 3]


def test_texts_are_read_alike_from_any_editor(build, tmp_path):
    files = {**GOOD, "neutral/dialogue.txt": "- Nine?\n- Nine.\n\n- Ten?"}
    plain = load_corpus(build(files))
    crlf = {k: b"\xef\xbb\xbf" + v.replace("\n", "\r\n").encode() for k, v in files.items()}
    assert load_corpus(write(tmp_path / "crlf", crlf)).hash == plain.hash


@pytest.mark.parametrize("file", sorted(set(GOOD) - {"manifest.yaml"}))
def test_the_hash_changes_with_any_text(build, tmp_path, file):
    changed = write(tmp_path / "changed", {**GOOD, file: GOOD[file] + " Still."})
    assert load_corpus(changed).hash != load_corpus(build()).hash


K1, K2 = GOOD["stories/calm.txt"].split("\n\n")
A1, A2 = GOOD["stories/afraid.txt"].split("\n\n")
RELABELLED = {
    "concept": ({}, {"stories/afraid.txt": A1, "stories/calm.txt": f"{A2}\n\n{K1}\n\n{K2}"}),
    "kind": (
        {"direct/_baseline.txt": None},
        {
            "direct/_baseline.txt": None,
            "stories/calm.txt": K1,
            "direct/calm.txt": f"{K2}\n\n{GOOD['direct/calm.txt']}",
        },
    ),
    "scenario": (
        {},
        {
            BASELINE: None,
            FRAMING: None,
            "paired/the_bus/baseline.txt": GOOD[BASELINE],
            "paired/the_bus/afraid.txt": GOOD[FRAMING],
        },
    ),
    "order of concepts": ({}, {"manifest.yaml": manifest_of("afraid", "calm")}),
}


@pytest.mark.parametrize(("before", "after"), RELABELLED.values(), ids=RELABELLED)
def test_the_hash_changes_with_labels_alone(tmp_path, before, after):
    one, other = (
        load_corpus(write(tmp_path / name, {k: v for k, v in files.items() if v is not None}))
        for name, files in (("one", {**GOOD, **before}), ("other", {**GOOD, **after}))
    )
    assert sorted(one.texts) == sorted(other.texts)
    assert one.hash != other.hash


def test_line_breaks_inside_a_text_stay(build):
    dialogue = "- Nine?\n- Nine.\n   \n- Ten?\n- Ten."
    corpus = load_corpus(build({"neutral/dialogue.txt": dialogue}))
    assert corpus.neutral[:2] == ["- Nine?\n- Nine.", "- Ten?\n- Ten."]


def test_select_keeps_shared_negatives_and_names_what_it_drops(build):
    corpus = load_corpus(build())
    with pytest.warns(UserWarning, match=r"calm \(1\)") as caught:
        paired = corpus.select(["paired", "direct"])
    assert len(caught) == 1
    assert paired.concepts == ["afraid"]
    assert {e.path for e in paired.entries} == {
        "direct/_baseline.txt",
        "paired/the_commute/baseline.txt",
        "paired/the_commute/afraid.txt",
    }
    assert {t.concept for t in paired.heldout} == {None}
    assert paired.hash != corpus.hash
    assert corpus.select().hash == corpus.hash
    assert {e.path for e in corpus.select("story").entries if e.concept is None} == {
        "direct/_baseline.txt",
        "paired/the_commute/baseline.txt",
    }


def test_select_refuses_unknown_kinds_and_empty_selections(build):
    corpus = load_corpus(build())
    with pytest.raises(CorpusError, match=r"\['stories'\].*'story'"):
        corpus.select(["stories", "direct"])
    with pytest.raises(CorpusError, match="no concept .* 2 texts of kind direct"):
        corpus.select("direct")


def test_an_unknown_concept_is_refused_with_the_closest_name(build):
    corpus = load_corpus(build())
    with pytest.raises(CorpusError, match="'clam'.*did you mean 'calm'"):
        corpus.positives("clam")
    with pytest.raises(CorpusError, match="'clam'"):
        corpus.negatives("clam")


def test_callers_cannot_change_the_labels(build):
    corpus = load_corpus(build())
    before = corpus.positives("calm").tolist()
    corpus.positives("calm")[:] = 0
    assert corpus.positives("calm").tolist() == before


def test_counts_and_summary(build):
    corpus = load_corpus(build())
    counts = corpus.counts()
    assert counts.index.name == "concept"
    assert counts.loc["calm"].to_dict() == {
        "story": 2, "direct": 1, "paired": 0, "total": 3, "words": 21, "cluster": "peace",
    }  # fmt: skip
    summary = corpus.summary()
    assert "\n" not in summary
    assert "2 concepts in 2 clusters: 11 texts" in summary
    assert corpus.hash[:8] in summary


def test_optional_folders_may_be_absent(build):
    absent = {k: None for k in GOOD if k.startswith(("neutral", "heldout", "paired", "direct"))}
    corpus = load_corpus(build(absent))
    assert corpus.concepts == ["calm", "afraid"]
    assert corpus.neutral == [] and corpus.heldout == []


# What is said of a bad one


BAD_FILES = [
    ("stories/afraid.txt", "caf\xe9".encode("latin-1"), "not UTF-8, byte 0xe9 at offset 3"),
    ("stories/clam.txt", "A.\n\nB.", "concept 'clam' is not .*did you mean 'calm'"),
    ("stories/baseline.txt", "A.", "concept 'baseline' is not in manifest.yaml"),
    ("heldout/stories/joy.txt", "A.", "concept 'joy' is not in manifest.yaml"),
    ("paired/the_commute/joy.txt", "A.\n\nB.", "concept 'joy' is not in manifest.yaml"),
    ("stories/Calm.txt", "A.", "rename it in snake_case"),
    ("direct/very-calm.txt", "A.", "rename it in snake_case"),
    ("neutral/two words.txt", "A.", "rename it in snake_case"),
    ("paired/The Visit/baseline.txt", "A.", "rename it in snake_case"),
    (BASELINE, None, "no text; a paired scenario needs"),
    (BASELINE, "\n", "no text; a paired scenario needs"),
    (FRAMING, "One.", "1 texts where baseline.txt has 2"),
    ("direct/calm.txt", "So.\n\nNo.\n\n So.", "the same text twice, keep one"),
    ("direct/afraid.txt", "He let the\nphone  ring out.", "the same text under calm and afraid"),
    ("direct/calm.txt", "The shop opens at nine.", "the same text under no concept and calm"),
    ("direct/calm.txt", "Basalt is dark.", "the same text under calm and no concept"),
    ("heldout/direct/afraid.txt", "There is no hurry in me.", "under afraid and calm"),
    ("heldout/direct/calm.txt", "He let the phone ring out.", "a held-out text may not"),
    ("manifest.yaml", b"\xff", "not UTF-8, byte 0xff at offset 0"),
    ("manifest.yaml", None, "is missing"),
    ("manifest.yaml", "", "`concepts` must map"),
    ("manifest.yaml", "version: 1\nconcepts: [unclosed", r"line \d, not valid YAML"),
    ("manifest.yaml", "clusters: {}\nclusters: {}", "line 2, .*'clusters' is written twice"),
    ("manifest.yaml", "a: &x [1]\n? *x\n: 2\n", "not valid YAML"),
    ("manifest.yaml", GOOD["manifest.yaml"].replace("version: 1", "version: 2"), "version is 2"),
    ("manifest.yaml", GOOD["manifest.yaml"].replace("clusters", "groups"), "`clusters` must map"),
    ("manifest.yaml", GOOD["manifest.yaml"] + "  Very Calm: 3", "'Very Calm' cannot name"),
    ("manifest.yaml", GOOD["manifest.yaml"] + "  joy: a gloss", "joy: must have the fields gloss"),
    ("manifest.yaml", manifest_of("calm", "afraid", True), "True cannot name a concept"),
    ("manifest.yaml", manifest_of("calm", "afraid", "baseline"), "'baseline' cannot name"),
]
BAD_FIELDS = [
    ({"cluster": "peas"}, "cluster 'peas' is not under `clusters` .did you mean 'peace'"),
    ({"near": ["afriad"]}, "near names 'afriad', .*did you mean 'afraid'"),
    ({"near": ["calm"]}, "near names 'calm', which is no other concept$"),
    ({"near": "afraid"}, "near is 'afraid': give a list of concepts"),
    ({"valence": 1.2}, "valence is 1.2: give a number from -1 to 1"),
    ({"valence": "high"}, "valence is 'high': give a number from -1 to 1"),
    ({"arousal": float("nan")}, "arousal is nan: give a number"),
    ({"arousal": True}, "arousal is True: give a number"),
    ({"sources": []}, r"sources is \[\]: give a list of one or more texts"),
    ({"gloss": None}, "gloss is missing: give a line of text"),
    ({"valance": 0.1}, "unknown field 'valance' .did you mean 'valence'"),
]


def refused(root, expected):
    """Problems that loader and preflight both name, one of them as expected."""
    found = preflight(root)
    assert found.corpus is None
    with pytest.raises(CorpusError) as error:
        load_corpus(root)
    assert all(problem in str(error.value) for problem in found.problems)
    assert any(re.search(expected, problem) for problem in found.problems), found.problems
    return found.problems


@pytest.mark.parametrize(("file", "content", "expected"), BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(build, file, content, expected):
    name = file.replace("/baseline.txt", "") if "Visit" in file else file
    refused(build({file: content}), f"{re.escape(name)}.*{expected}")


@pytest.mark.parametrize(("fields", "expected"), BAD_FIELDS)
def test_a_bad_field_of_the_manifest_is_named_with_its_concept(build, fields, expected):
    manifest = manifest_of("calm", "afraid", calm=fields)
    problems = refused(build({"manifest.yaml": manifest}), f"^manifest.yaml: calm: .*{expected}")
    assert len(problems) == 1


def test_a_corpus_without_any_labelled_text_is_not_usable(build):
    unlabelled = {k: None for k in GOOD if k.startswith(("stories", "direct/calm", "paired"))}
    refused(build(unlabelled), "nothing usable: no concept has 2 texts")


def test_one_fault_is_one_problem(build):
    assert len(preflight(build({"stories/afraid.txt": b"\xff\xfe"})).problems) == 1
    assert len(preflight(build({"manifest.yaml": "["})).problems) == 1


def test_all_problems_are_listed_at_once(build):
    root = build(
        {
            "manifest.yaml": manifest_of(
                "calm", "afraid", calm={"valence": 7, "near": ["x"]}, afraid={"gloss": ""}
            ),
            "stories/joy.txt": "A.\n\nA.",
            "direct/Bad.txt": "A.",
            "direct/calm.txt": b"\x80",
            "paired/the_visit/calm.txt": "One visit.",
            "heldout/stories/calm.txt": "The kettle took its time.",
        }
    )
    problems = preflight(root).problems
    for part in (
        "calm: valence is 7", "near names 'x'", "afraid: gloss is ''", "concept 'joy'",
        "same text twice", "direct/Bad.txt", "direct/calm.txt", "the_visit/baseline.txt", "held-out"
    ):  # fmt: skip
        assert any(part in problem for problem in problems), part
    assert len(problems) == 8  # both faults of calm stand in one line


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"])
def test_an_empty_file_is_a_warning_that_names_it(build, content):
    root = build({"direct/afraid.txt": content})
    with pytest.warns(UserWarning, match=r"direct/afraid\.txt: the file is empty"):
        corpus = load_corpus(root)
    assert corpus.concepts == ["calm", "afraid"]


def test_an_empty_framing_is_skipped_with_a_warning(build):
    with pytest.warns(UserWarning, match=r"paired/the_commute/calm\.txt: the file is empty"):
        load_corpus(build({"paired/the_commute/calm.txt": ""}))


def test_concepts_with_too_few_texts_are_dropped_by_name_with_their_texts(build):
    manifest = manifest_of("lonely", "calm", "afraid", "proud")
    root = build({"manifest.yaml": manifest, "direct/proud.txt": "I feel proud. Look."})
    with pytest.warns(UserWarning, match=r"fewer than 2 distinct texts: lonely \(0\), proud \(1\)"):
        corpus = load_corpus(root)
    assert corpus.concepts == ["calm", "afraid"]
    assert not any("proud" in text for text in corpus.texts)
    with pytest.raises(CorpusError, match="'proud'.*fewer than 2 texts"):
        corpus.positives("proud")
    with pytest.warns(UserWarning, match="lonely"):
        assert load_corpus(root, min_positives=1).concepts == ["calm", "afraid", "proud"]


def test_the_same_text_again_does_not_make_a_concept_large_enough(build):
    root = build({"stories/calm.txt": "One.", "direct/calm.txt": "One."})
    with pytest.warns(UserWarning, match=r"calm \(1\)"):
        assert load_corpus(root).concepts == ["afraid"]


@pytest.mark.parametrize(
    "stray",
    ["notes.txt", "drafts/calm.txt", "stories/calm.md", "stories/old/calm.txt", "stories/calm.TXT",
     "paired/calm.txt", "heldout/paired/calm.txt", "neutral/more/a.txt"],
)  # fmt: skip
def test_files_that_are_not_read_are_named(build, stray):
    found = preflight(build({stray: "Unread."}))
    assert found.problems == []
    (warning,) = found.warnings
    assert "not read" in warning
    assert stray.startswith(warning.split(":")[0])


def test_hidden_and_readme_files_are_passed_over(build):
    root = build({".DS_Store": b"\xff", "stories/.calm.txt.swp": b"\xff", "stories/README.md": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus(root)


def test_a_wrong_path_says_what_to_give_instead(build, tmp_path):
    with pytest.raises(CorpusError, match="no folder .*nowhere"):
        load_corpus(tmp_path / "nowhere")
    root = build()
    with pytest.raises(CorpusError, match="is a file: give the folder"):
        load_corpus(root / "manifest.yaml")
    root.rename(tmp_path / "corpus")
    with pytest.raises(CorpusError, match=f"give {tmp_path / 'corpus'} instead"):
        load_corpus(tmp_path)
    with pytest.raises(CorpusError, match="min_positives is 0"):
        load_corpus(tmp_path / "corpus", min_positives=0)


# The report


def test_report_of_a_good_corpus(build):
    report = preflight(build({"direct/afraid.txt": ""})).report()
    assert "calm" in report and "longest text: 10 words (direct/calm.txt)" in report
    assert "fewest texts: calm (3), afraid (4)" in report
    assert "direct/afraid.txt: the file is empty" in report
    assert report.endswith("ready to use")


def test_report_of_a_bad_corpus_lists_every_problem_and_does_not_call_it_ready(build):
    found = preflight(build({"stories/Bad.txt": "A.", "stories/joy.txt": "B."}))
    report = found.report()
    assert "stories/Bad.txt" in report and "stories/joy.txt" in report
    assert report.endswith("not usable until the problems are mended")


def large_corpus(root: Path) -> Path:
    names = [f"state_{number}" for number in range(260)]
    files = {"manifest.yaml": manifest_of(*names)}
    for name in names:
        for folder in ("stories", "direct"):
            texts = [f"{folder} {name} {number} " + "word " * 80 for number in range(10)]
            files[f"{folder}/{name}.txt"] = "\n\n".join(texts)
    return write(root, files)


def test_a_corpus_of_full_size_loads_in_under_a_second_and_its_report_fits_a_screen(tmp_path):
    root = large_corpus(tmp_path)
    start = time.process_time()
    found = preflight(root)
    assert time.process_time() - start < 1
    report = found.report().splitlines()
    assert len(report) <= 40
    assert max(map(len, report[1:])) <= 100  # the first names the folder, however deep


# Properties

words = st.text(alphabet="abcd é", min_size=1, max_size=12).map(str.strip).filter(bool)
names = st.sampled_from(["calm", "afraid", "proud"])


@st.composite
def corpora(draw):
    """Files of a corpus in which every text stands once."""
    texts = draw(st.lists(words, min_size=4, max_size=24, unique_by=lambda t: " ".join(t.split())))
    targets = st.sampled_from(
        [
            f"{kind}/{name}.txt"
            for kind in ("stories", "direct")
            for name in ("calm", "afraid", "_b")
        ]
        + ["neutral/n.txt", "heldout/stories/calm.txt", "heldout/direct/_hard.txt"]
    )
    grouped = {"stories/calm.txt": texts[:2], "direct/afraid.txt": texts[2:4]}
    for text in texts[4:]:
        grouped.setdefault(draw(targets), []).append(text)
    return {file: "\n\n".join(texts) for file, texts in grouped.items()}


def load(root: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_corpus(root)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("corpus")


MANIFEST = {"manifest.yaml": manifest_of("calm", "afraid")}


@settings(max_examples=50, deadline=None)
@given(files=corpora())
def test_positives_and_negatives_split_the_texts(new_folder, files):
    corpus = load(write(new_folder(), {**files, **MANIFEST}))
    assert len(set(corpus.texts)) == len(corpus.texts)
    for concept in corpus.concepts:
        positives, negatives = corpus.positives(concept), corpus.negatives(concept)
        assert sorted([*positives, *negatives]) == list(range(len(corpus.texts)))
        assert np.all(np.diff(positives) > 0) and np.all(np.diff(negatives) > 0)
        written = {
            text
            for file, content in files.items()
            if file in (f"stories/{concept}.txt", f"direct/{concept}.txt")
            for text in content.split("\n\n")
        }
        assert {corpus.texts[row] for row in positives} == written


@settings(max_examples=50, deadline=None)
@given(files=corpora(), data=st.data())
def test_the_order_of_files_on_disk_changes_nothing(new_folder, files, data):
    files = {**files, **MANIFEST}
    shuffled = dict(data.draw(st.permutations(list(files.items()))))
    corpus = load(write(new_folder(), files))
    again = load(write(new_folder(), shuffled))
    assert again.hash == corpus.hash
    assert (again.texts, again.entries) == (corpus.texts, corpus.entries)


# The corpus that this repository ships


def test_the_corpus_of_this_repository_is_sound():
    found = preflight(Path(__file__).parents[1] / "corpus")
    assert (found.problems, found.warnings) == ([], [])
    assert len(found.corpus.concepts) >= 24
