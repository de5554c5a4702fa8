"""Ratings that a user has downloaded are read, rescaled and matched. All numbers are made up."""

import numpy as np
import pandas as pd
import pytest

from amygdala_lib.artefacts import repository_root
from amygdala_lib.corpus import load_corpus
from amygdala_lib.errors import AmygdalaError
from amygdala_lib.norms import FORMATS, OTHER_SPELLINGS, OTHER_WORDS, load_norms, match_norms

WARRINER = """\
,Word,V.Mean.Sum,V.SD.Sum,V.Rat.Sum,A.Mean.Sum,A.SD.Sum,A.Rat.Sum,D.Mean.Sum,D.SD.Sum,D.Rat.Sum
1,gleeful,9,1.2,20,5,2.1,21,3,1.9,22
2,Null,5,1.2,20,1,2.1,21,7,1.9,22
"""
NRC_1 = "Word\tValence\tArousal\tDominance\ngleeful\t1.000\t0.500\t0.250\nglum\t0.000\t0.250\t0.5\n"
NRC_2 = "term\tvalence\tarousal\tdominance\ngleeful\t1.0\t0.0\t-0.5\nup the creek\t-1.0\t0.5\t0\n"
EMOBANK = """\
id,split,V,A,D,text
a_1,train,5.0,3.0,2.0,"Glee, all day."
a_2,dev,1.0,2.0,3.0,Nothing but rain
"""
FILES = {"warriner": WARRINER, "nrc-vad": NRC_1, "emobank": EMOBANK}


@pytest.fixture
def written(tmp_path):
    def write(content, name="norms.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def norms_of(*words):
    table = pd.DataFrame({"valence": np.linspace(-1, 1, len(words)), "arousal": 0.5}, list(words))
    return table.rename_axis("word")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WARRINER, {"gleeful": (1, 0, -0.5), "null": (0, -1, 0.5)}),
        (NRC_1, {"gleeful": (1, 0, -0.5), "glum": (-1, -0.5, 0)}),
        (NRC_2, {"gleeful": (1, 0, -0.5), "up the creek": (-1, 0.5, 0)}),
        (EMOBANK, {"Glee, all day.": (1, 0, -0.5), "Nothing but rain": (-1, -0.5, 0)}),
    ],
    ids=["warriner", "nrc-vad v1", "nrc-vad v2", "emobank"],
)
def test_each_format_is_told_by_its_header_and_rescaled(written, content, expected):
    norms = load_norms(written(content))
    assert norms.columns.tolist() == ["valence", "arousal", "dominance"]
    assert norms.index.name == ("text" if content is EMOBANK else "word")
    assert norms.index.tolist() == list(expected)
    assert np.allclose(norms.to_numpy(), list(expected.values()))


@pytest.mark.parametrize("name", FILES)
def test_the_licence_is_said(written, capsys, name):
    load_norms(written(FILES[name]), name)
    assert FORMATS[name].licence in capsys.readouterr().err


def test_a_format_can_be_named_and_a_byte_order_mark_and_windows_lines_do_no_harm(written):
    path = written(b"\xef\xbb\xbf" + NRC_2.replace("\n", "\r\n").encode())
    assert load_norms(path).equals(load_norms(path, "nrc-vad"))
    assert load_norms(path).loc["gleeful", "valence"] == 1


def test_words_that_look_like_missing_values_and_quotes_are_words(written):
    path = written(NRC_1 + 'nan\t0.5\t0.5\t0.5\nnull\t0.5\t0.5\t0.5\n"\t0.5\t0.5\t0.5\n')
    assert load_norms(path).index.tolist() == ["gleeful", "glum", "nan", "null", '"']


def test_dominance_may_be_absent(written):
    path = written("Word,V.Mean.Sum,A.Mean.Sum\ngleeful,9,5\n")
    assert load_norms(path).columns.tolist() == ["valence", "arousal"]


def test_a_word_rated_twice_gets_the_mean_and_a_warning(written):
    path = written(NRC_1 + "GLUM\t1.0\t0.25\t0.5\n")
    with pytest.warns(UserWarning, match="1 rows repeat an earlier word \\('glum'\\).*mean"):
        norms = load_norms(path)
    assert norms.loc["glum"].tolist() == [0, -0.5, 0]
    assert norms.index.tolist() == ["gleeful", "glum"]


def test_a_missing_file_says_where_to_get_it_and_under_what_licence(tmp_path):
    with pytest.raises(AmygdalaError) as error:
        load_norms(tmp_path / "nowhere.csv")
    for form in FORMATS.values():
        assert form.source in str(error.value) and form.licence in str(error.value)
    with pytest.raises(AmygdalaError) as error:
        load_norms(tmp_path / "nowhere.csv", "emobank")
    assert FORMATS["emobank"].source in str(error.value)
    assert FORMATS["warriner"].source not in str(error.value)


def test_all_that_is_wrong_in_a_file_is_said_at_once_with_the_lines(written):
    path = written(NRC_1 + "\t0.5\t0.5\t0.5\nodd\t1.5\tmany\t0.5\nodder\t-1\t\t0.5\n")
    with pytest.raises(AmygdalaError) as error:
        load_norms(path)
    said = str(error.value)
    assert "no word in line 4" in said
    assert "valence is outside 0 to 1 in 2 rows (lines 5, 6) (first: 1.5)" in said
    assert "arousal is not a number in 2 rows (lines 5, 6)" in said


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ("a,b\n1,2\n", None, "begins with 'a,b', which is none of the known headers"),
        ("", None, "begins with ''"),
        ("gleeful\t1.0\t0.5\t0.25\n", None, "Give the original file, with its first line"),
        (WARRINER, "emobank", "(?s)no column text.*no column v\n.*no column a\n.*choose another"),
        (WARRINER.splitlines()[0] + "\n", None, "no rows after the first line"),
        (WARRINER, "anew", "no format 'anew': choose one of warriner, nrc-vad, emobank"),
        (b"Word\xff\n", None, "not UTF-8"),
        ("Word\tValence\tArousal\na\t1\t1\nb\t1\t1\t1\t1\t1\n", None, "cannot be read as nrc-vad"),
    ],
)
def test_files_that_are_something_else_are_refused(written, content, format, message):
    with pytest.raises(AmygdalaError, match=message):
        load_norms(written(content), format)


def test_concepts_are_matched_as_whole_entries_spaces_before_hyphens(capsys):
    norms = norms_of("calm", "worn-out", "at ease", "at-ease", "edgy", "calmly")
    found = match_norms(["worn_out", "calm", "at_ease", "on_edge", "afraid"], norms)
    assert found.index.tolist() == ["worn_out", "calm", "at_ease", "on_edge", "afraid"]
    assert found["word"].tolist()[:4] == ["worn-out", "calm", "at ease", "edgy"]
    assert found["word"].isna().tolist() == [False] * 4 + [True]
    assert found.loc["calm", "valence"] == norms.loc["calm", "valence"]
    assert found.loc["afraid", ["valence", "arousal"]].isna().all()
    assert "norms for 4 of 5 concepts; none for afraid" in capsys.readouterr().err


def test_a_concept_is_not_given_the_rating_of_another_word_spelt_alike():
    found = match_norms(["song", "calm"], norms_of("song", "calm"))
    assert found["valence"].isna().tolist() == [True, False]


def test_the_tables_of_words_name_concepts_of_the_corpus():
    manifest = load_corpus(repository_root() / "corpus").manifest
    assert {*OTHER_SPELLINGS, *OTHER_WORDS} <= {*manifest}


def test_no_concept_found_is_no_error():
    found = match_norms(["calm", "afraid"], norms_of("table"))
    assert found[["valence", "arousal"]].isna().all(axis=None)


def test_norms_that_cannot_be_matched_are_refused(written):
    with pytest.raises(AmygdalaError) as error:
        match_norms(["calm", "calm"], norms_of("calm", "calm"))
    assert "several rows for 'calm'" in str(error.value)
    assert "concepts given more than once: calm" in str(error.value)
    with pytest.raises(AmygdalaError, match="norms of sentences"):
        match_norms(["calm"], load_norms(written(EMOBANK)))
