"""Tagged journal entries become pairs; what is not scored is not guessed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib.cli import main
from amygdala_lib.corpus import from_memory_graph
from amygdala_lib.errors import CorpusError

JOURNAL = [
    {"text": "The lake lay there and so did I.", "tags": "calm:8 anxious:1"},
    {"text": "The letter has not come.", "tags": "anxious:7 calm:2"},
    {"text": "Bread, then the accounts.", "tags": "calm:4 anxious:3"},
    {"text": "Three men at the gate,\nall talking.", "tags": "calm:0 alarmed:9"},
]


@pytest.fixture
def journal(tmp_path):
    def write(entries):
        path = tmp_path / "journal.jsonl"
        lines = (e if isinstance(e, str) else json.dumps(e) for e in entries)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def test_high_scores_are_paired_with_low_ones_and_the_middle_is_skipped(journal):
    with pytest.warns(UserWarning, match=r"no pairs for alarmed \(1 positive, 0 negative\)"):
        pairs = from_memory_graph(journal(JOURNAL))
    calm = [pair for pair in pairs if pair.concept == "calm"]
    anxious = [pair for pair in pairs if pair.concept == "anxious"]
    assert [pair.positive for pair in calm] == ["The lake lay there and so did I."]
    assert {pair.negative for pair in calm} <= {JOURNAL[1]["text"], JOURNAL[3]["text"]}
    # The entry that does not mention anxiety is no evidence against it.
    assert [(p.positive, p.negative) for p in anxious] == [(JOURNAL[1]["text"], JOURNAL[0]["text"])]


@pytest.mark.filterwarnings("ignore:.*no pairs")
def test_thresholds_are_per_emotion_and_inclusive(journal):
    path = journal(JOURNAL)
    assert not [p for p in from_memory_graph(path, thresholds={"calm": 9}) if p.concept == "calm"]
    exact = from_memory_graph(path, thresholds={"calm": 8}, low=0)
    assert [p.negative for p in exact if p.concept == "calm"] == [JOURNAL[3]["text"]]


@pytest.mark.filterwarnings("ignore:.*no pairs")
def test_json_lines_out_are_the_pairs(journal, tmp_path):
    out = tmp_path / "pairs.jsonl"
    pairs = from_memory_graph(journal(JOURNAL), out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows == [vars(pair) for pair in pairs]


def test_an_entry_written_twice_is_one_entry(journal):
    entries = [*JOURNAL[:2], {**JOURNAL[0], "text": JOURNAL[0]["text"] + "  "}]
    assert len(from_memory_graph(journal(entries))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: give"),
        ({"text": " ", "tags": "calm:8"}, "line 2: give"),
        ({"text": "A.", "tags": ["calm"]}, "line 2: give"),
        ({"text": "A.", "tags": "calm"}, "tag 'calm': write emotion:score"),
        ({"text": "A.", "tags": "calm:lots"}, "'lots' is not a number"),
        ({"text": "A.", "tags": "calm:11"}, "scores go from 0 to 10"),
        ({"text": "A.", "tags": "calm:-1"}, "scores go from 0 to 10"),
        ({"text": "A.", "tags": "calm:nan"}, "scores go from 0 to 10"),
        ({"text": "A.", "tags": "calm:1 calm:2"}, "calm is scored twice"),
        ({**JOURNAL[0], "tags": "calm:1"}, "the text of line 1 again, with other tags"),
    ],
)
def test_a_faulty_line_is_named(journal, line, message):
    with pytest.raises(CorpusError, match=message.replace("(", r"\(")):
        from_memory_graph(journal([JOURNAL[0], line]))


def test_all_problems_come_at_once_and_nothing_is_written(journal, tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text("before")
    faulty = journal([{"text": "A.", "tags": "calm:12 sad"}, "{", JOURNAL[0]])
    with pytest.raises(CorpusError) as caught:
        from_memory_graph(faulty, out, high=1, low=2, thresholds={"clam": 5})
    for part in ("calm:12", "'sad'", "line 2", "high is 1", "did you mean 'calm'", "5 problem(s)"):
        assert part in str(caught.value)
    assert out.read_text() == "before" and {p.name for p in tmp_path.iterdir()} == {
        "journal.jsonl",
        "pairs.jsonl",
    }


def test_a_missing_journal_is_an_error_not_a_traceback(tmp_path, capsys):
    missing, out = tmp_path / "no.jsonl", tmp_path / "out.jsonl"
    assert main(["corpus", "from-memory-graph", str(missing), str(out)]) == 2
    assert "cannot be read" in capsys.readouterr().err and not out.exists()


@pytest.mark.filterwarnings("ignore:.*no pairs")
def test_the_example_in_the_corpus_folder_works(tmp_path, capsys):
    from amygdala_lib.artefacts import repository_root

    example = repository_root() / "corpus" / "memory_graph_example.jsonl"
    out = tmp_path / "pairs.jsonl"
    arguments = ["corpus", "from-memory-graph", str(example), str(out), "--threshold", "calm", "7"]
    assert main(arguments) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) >= 4
    assert "pairs for" in capsys.readouterr().out


scores = st.dictionaries(st.sampled_from(["calm", "sad", "proud"]), st.integers(0, 10), min_size=1)


@pytest.mark.filterwarnings("ignore:.*no pairs")
@given(st.lists(scores, min_size=1, max_size=12), st.integers(0, 3))
def test_every_pair_is_right_by_its_own_scores(tmp_path_factory, tagged, seed):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    texts = [f"Entry number {number}." for number in range(len(tagged))]
    rows = [
        {"text": text, "tags": " ".join(f"{name}:{score}" for name, score in tags.items())}
        for text, tags in zip(texts, tagged, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_of = dict(zip(texts, tagged, strict=True))
    pairs = from_memory_graph(path, seed=seed)
    for pair in pairs:
        assert score_of[pair.positive][pair.concept] >= 6
        assert score_of[pair.negative][pair.concept] <= 2
    positives = [(pair.concept, pair.positive) for pair in pairs]
    assert len(set(positives)) == len(positives)
    assert from_memory_graph(path, seed=seed) == pairs
