"""Files are there whole or not at all, and say where they come from."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amygdala_lib.artefacts import (
    provenance,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
)
from amygdala_lib.errors import ArtefactError

STEP = "notebook 02"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


# Replacing a file


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, interruption):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(interruption), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise interruption
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_first_write_leaves_no_file(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_a_folder_is_left_alone(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folders_are_made_and_others_may_read_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "deep" / "er" / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "er" / "a.json").stat().st_mode) == 0o640


# JSON


@settings(max_examples=20)
@given(content=st.dictionaries(st.text(), JSON))
def test_json_comes_back_as_it_was_and_in_order(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, content)
    read = read_json(path, STEP)
    assert read == content
    assert list(read) == list(content)


def test_json_is_text_that_people_can_read(tmp_path):
    write_json(tmp_path / "a.json", {"concept": "Gelöst"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "concept": "Gelöst"\n}\n'


def test_what_json_cannot_hold_is_refused_before_the_old_file_is_touched(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ArtefactError, match="Path.*pass text"):
        write_json(path, {"a": Path("b")})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b'{"a": ', "is damaged"),
        (b"", "is damaged"),
        (b'{"a": "\xff"}', "is damaged"),
        (b"[1, 2]", "holds a list"),
    ],
)
def test_a_file_that_cannot_be_read_names_itself_and_the_step_that_makes_it(
    tmp_path, content, message
):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=message) as refused:
        read_json(path, STEP)
    assert str(path) in str(refused.value)
    assert STEP in str(refused.value)


# Tensors


def test_tensors_come_back_to_the_bit_in_their_dtype_whatever_their_layout(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "trained": torch.randn(2, requires_grad=True),
        "slice": torch.arange(10)[2:5],
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"key": "größe"})
    read, metadata = read_tensors(tmp_path / "a.safetensors", STEP)
    assert metadata == {"key": "größe"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "another format"])
def test_tensors_that_cannot_be_read_name_the_file_and_the_step_that_makes_it(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1000)})
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"a": 1}, path)
    with pytest.raises(ArtefactError) as refused:
        read_tensors(path, STEP)
    assert str(path) in str(refused.value)
    assert STEP in str(refused.value)


def test_tensors_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    shared = torch.ones(3)
    with pytest.raises(RuntimeError):
        write_tensors(path, {"a": shared, "b": shared})
    assert torch.equal(read_tensors(path, STEP)[0]["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


# Where it comes from


def test_provenance_states_format_versions_and_the_facts_given():
    said = provenance(method="pooled")
    assert said["format_version"] == 1
    assert said["method"] == "pooled"
    assert said["versions"].keys() == {
        "python", "amygdala_lib", "torch", "transformers", "numpy",
    }  # fmt: skip
    assert said["versions"]["torch"] == torch.__version__
    json.dumps(said)
