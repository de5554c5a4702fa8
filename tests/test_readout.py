"""A readout needs little to be read, and says how strongly each concept shows."""

import argparse
import functools
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from amygdala_lib import AmygdalaError, Readout, artefacts, capture, extract, steer
from amygdala_lib.cli import reading
from amygdala_lib.cli.reading import Transcript
from amygdala_lib.errors import ArtefactError, ModelError, SteeringError


@pytest.fixture(scope="module")
def acts(loaded, corpus):
    return capture(loaded("qwen3_5"), corpus, [1, 3], pool="mean", progress=False)


@pytest.fixture(scope="module")
def dirs(acts, corpus):
    return extract(acts, corpus)


@pytest.fixture
def minimal(tmp_path):
    """The least another program may write: four fields, and one tensor per layer, in bf16."""
    fields = {"concepts": ["calm", "afraid"], "layers": [3], "hidden_size": 64, "dtype": "bfloat16"}
    (tmp_path / "readout.json").write_text(json.dumps(fields))
    vectors = torch.eye(64)[[5, 7]].bfloat16()
    save_file({"layer_3.vectors": vectors}, tmp_path / "readout.safetensors")
    return tmp_path


def test_projections_are_dot_products_in_standard_deviations(dirs, acts, tmp_path):
    readout = Readout.load(dirs.save(tmp_path))
    raw = readout.project(acts[3], 3, zscore=False)
    assert raw.shape == (13, 3)
    expected = acts[3].double() @ dirs.vectors[3].double().T
    assert torch.allclose(raw.double(), expected, atol=1e-5)
    scores = (expected - dirs.means[3]) / dirs.stds[3]
    assert torch.allclose(readout.project(acts[3], 3).double(), scores, atol=1e-4)


def test_any_leading_shape_and_dtype_can_be_projected(dirs):
    readout = Readout(dirs)
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    assert readout.project(hidden, 1).shape == (2, 5, 3)
    assert readout.project(hidden[0, 0], 1).shape == (3,)
    narrow = readout.project(hidden.bfloat16(), 1)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow, readout.project(hidden.bfloat16().float(), 1))


def test_four_fields_and_the_vectors_are_enough(minimal):
    readout = Readout.load(minimal)
    hidden = torch.arange(64.0)
    assert readout.project(hidden, 3).tolist() == [5, 7], "without deviations: raw projections"
    assert readout.directions.concepts == ["calm", "afraid"]


def test_a_minimal_readout_can_be_saved_again(minimal, tmp_path):
    again = Readout.load(Readout.load(minimal).directions.save(tmp_path / "again"))
    assert again.project(torch.arange(64.0), 3).tolist() == [5, 7]


def test_a_minimal_readout_cannot_steer_for_want_of_a_unit(minimal, lm):
    directions = Readout.load(minimal).directions
    with (
        pytest.raises(SteeringError, match=r"no residual norm for layers \[3\].*extract"),
        steer(lm, directions, {"calm": 1.0}),
    ):
        pass


def test_a_folder_without_a_readout_says_which_step_writes_it(tmp_path):
    with pytest.raises(ArtefactError, match="readout.json is not there.*notebook 02"):
        Readout.load(tmp_path)


def test_a_layer_or_size_the_readout_does_not_have_is_refused(dirs):
    readout = Readout(dirs)
    with pytest.raises(ModelError, match=r"no layer 2 \(it has \[1, 3\]\): extract it"):
        readout.project(torch.zeros(64), 2)
    with pytest.raises(ModelError, match="vectors of 32 do not fit a readout of 64.*qwen3_5"):
        readout.project(torch.zeros(32), 1)


# In a terminal


@pytest.fixture
def read(dirs, model_folder, corpus_folder, tmp_path, monkeypatch):
    """`amygdala read` with these arguments, and a readout of the hybrid under runs/mine."""
    monkeypatch.setattr(artefacts, "repository_root", lambda: tmp_path)
    facts = {"model_source": str(model_folder("qwen3_5")), "corpus_folder": str(corpus_folder)}
    dirs.save(tmp_path / "runs" / "mine", **facts)

    def run(*arguments):
        parser = argparse.ArgumentParser()
        reading.add_commands(parser.add_subparsers())
        given = parser.parse_args(["read", *arguments, "--run", "mine"])
        return given.function(given)

    return run


def tokens(*scored):
    return [
        SimpleNamespace(token=token, zscores=torch.tensor([scores])) for token, *scores in scored
    ]


def transcript(readings, *, coloured):
    out = io.StringIO()
    shown = Transcript(["calm", "at_ease", "sad"], out, coloured=coloured)
    for reading_ in readings:
        shown.token(reading_)
    shown.end()
    return out.getvalue()


def test_the_command_writes_the_text_and_the_strongest_states_of_each_sentence(read, capsys):
    assert read("She waited. Nobody came, and then it rained") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "She waited." and lines[2] == "Nobody came, and then it rained"
    for line in (lines[1], lines[3]):
        assert re.fullmatch(r"    (\w+ [+-]\d+\.\d, ){2}\w+ [+-]\d+\.\d", line)
    assert len(lines) == 4


def test_the_states_are_means_over_the_tokens_of_a_sentence(read, capsys, dirs, loaded, corpus):
    read("She waited. Rain.", "--layer", "3", "--concepts", "proud,calm")
    lines = capsys.readouterr().out.splitlines()
    tokens_of = functools.partial(capture, layers=[3], pool="tokens", progress=False)
    lm, few = loaded("qwen3_5"), Readout(dirs.select(["proud", "calm"], [3]))
    calibrated = few.calibrated(tokens_of(lm, corpus.all_texts))
    whole = calibrated.frame(tokens_of(lm, ["She waited. Rain."]), 3)[0]
    end = [token.strip() for token in whole.index].index(".") + 1
    for part, line in zip((whole[:end], whole[end:]), lines[1::2], strict=True):
        expected = part.mean().sort_values(ascending=False)
        assert line.strip() == ", ".join(f"{c} {z:+.1f}" for c, z in expected.items())


def test_without_the_corpus_it_says_what_deviations_mean(read, capsys, tmp_path):
    description = json.loads((tmp_path / "runs" / "mine" / "readout.json").read_text())
    description["corpus_folder"] = "no/such/corpus"
    (tmp_path / "runs" / "mine" / "readout.json").write_text(json.dumps(description))
    assert read("She waited.") == 0
    printed = capsys.readouterr()
    assert "deviations are those of whole texts" in printed.err and "She waited." in printed.out


def test_what_is_generated_goes_on_from_the_text_and_a_seed_repeats_it(read, capsys):
    pages = []
    for seed in ("1", "1", "2"):
        read("She waited and", "--generate", "12", "--seed", seed)
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] != pages[2]
    assert pages[0].startswith("She waited and") and len(pages[0].split("\n")[0]) > 20
    assert "\x1b" not in pages[0], "not a terminal"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--concepts", "calm,clam"], "'clam': do you mean calm"),
        (["x", "--layer", "2"], "no directions at layers"),
        (["x", "--generate", "-1"], "--generate is -1"),
        ([""], "there is no text"),
        (["She waited.", "--generate", "300"], "more than the 256"),
    ],
)
def test_the_command_says_what_is_wrong(read, arguments, said):
    with pytest.raises(AmygdalaError, match=said):
        read(*arguments)


def test_a_run_without_a_readout_says_what_makes_one(read, tmp_path):
    (tmp_path / "runs" / "mine" / "readout.json").unlink()
    with pytest.raises(ArtefactError, match="notebook 02"):
        read("x")


def test_tokens_have_the_colour_of_their_strongest_state_and_states_keep_theirs():
    readings = tokens(
        ("Rain", 0.2, 0.4, 0.1),
        (" fell", 0.0, 2.0, 1.0),
        (" on", 3.0, 0.0, 0.0),
        (".", 1.5, 2.5, 0),
    )
    page = transcript(readings, coloured=True)
    spans = re.findall(r"\x1b\[38;5;(\d+)m(.*?)\x1b\[0m", page)
    colours = {text: colour for colour, text in spans}
    assert page.startswith("Rain\x1b"), "too weak for a colour"
    assert colours[" fell"] == colours["."] == colours["at ease +1.2"] != colours[" on"]
    assert colours[" on"] == colours["calm +1.2"]
    assert len(set(colours.values())) == 3
    assert re.sub(r"\x1b\[[\d;]*m", "", page) == transcript(readings, coloured=False)


@pytest.mark.parametrize(
    ("pieces", "sentences"),
    [
        (["He", " said", ".", " She", " ran"], ["He said.", "She ran"]),
        (['"', "Go", "!", '"', " he", " said", "."], ['"Go!"', "he said."]),
        (["It", " is", " 3", ".", "5", " m", "."], ["It is 3.5 m."]),
        (["One", ". ", "Two", "."], ["One.", "Two."]),
        (["No", " end"], ["No end"]),
    ],
)
def test_sentences_end_where_they_end(pieces, sentences):
    page = transcript(tokens(*((piece, 1.0, 2.0, 3.0) for piece in pieces)), coloured=False)
    assert [line.strip() for line in page.splitlines()[::2]] == sentences


def test_a_token_that_was_never_read_has_no_state():
    nan = float("nan")
    readings = tokens(("One", 1.0, 2.0, 3.0), (".", nan, nan, nan))
    page = transcript(readings, coloured=True)
    assert page.splitlines()[0].endswith("\x1b[0m.") and "sad +3.0" in page, "a mean of one"
    assert transcript(readings[1:], coloured=True) == ".\n"


def test_the_token_for_the_end_of_a_text_is_not_shown():
    out = io.StringIO()
    shown = Transcript(["calm", "at_ease", "sad"], out, coloured=False, hidden=["<end>"])
    for reading_ in tokens(("One.", 1.0, 2.0, 3.0), ("<end>", 9.0, 9.0, 9.0)):
        shown.token(reading_)
    shown.end()
    assert out.getvalue() == "One.\n    sad +3.0, at ease +2.0, calm +1.0\n"


def test_a_text_cannot_write_escape_sequences_to_the_terminal():
    page = transcript(tokens(("a\x1b[31mb\x07\x9b2Jc", 0.0, 0.0, 0.0)), coloured=True)
    assert page.startswith("a[31mb2Jc\n")


def test_colours_only_where_they_are_wanted(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert reading._takes_colour(Terminal()) and not reading._takes_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not reading._takes_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not reading._takes_colour(Terminal())
