"""Directions survive the forms of other projects, and those projects read what is written."""

import dataclasses
import importlib
import sys
import zipfile
from typing import get_type_hints

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st

from amygdala_lib import AmygdalaError, Directions, capture, extract, steer
from amygdala_lib.directions import exchange
from amygdala_lib.directions.exchange import (
    from_steering_vectors,
    read_gguf,
    read_npz,
    to_steering_vector,
    write_gguf,
    write_npz,
)
from amygdala_lib.errors import ArtefactError

HIDDEN = 64
TEXT = "The kettle took its time, and"


def made(concepts=("calm", "afraid"), layers=(1, 3), hidden=HIDDEN):
    """Random directions, with another residual norm at every layer."""
    generator = torch.Generator().manual_seed(0)
    rows = {n: torch.randn(len(concepts), hidden, generator=generator) for n in layers}
    return Directions(
        concepts=list(concepts),
        vectors={n: torch.nn.functional.normalize(found) for n, found in rows.items()},
        residual_norms={n: 10.0 + n for n in layers},
        means={n: torch.randn(len(concepts), generator=generator) for n in layers},
        stds={n: torch.full((len(concepts),), 2.0) for n in layers},
    )


@pytest.fixture(scope="module")
def dirs_of(loaded, corpus):
    """Directions of a family's model, extracted."""

    def extracted(family):
        acts = capture(loaded(family), corpus, [0, 2, 4], pool="mean", progress=False)
        return extract(acts, corpus)

    return extracted


def logits(lm):
    ids = lm.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


def assert_raw(dirs):
    """z-scores of these are raw projections."""
    for layer in dirs.layers:
        assert torch.equal(dirs.means[layer], torch.zeros(len(dirs.concepts)))
        assert torch.equal(dirs.stds[layer], torch.ones(len(dirs.concepts)))


def assert_unit(dirs):
    for rows in dirs.vectors.values():
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-6)


def only_file_in(folder):
    """Fails if anything half-written lies beside the one file."""
    (path,) = folder.iterdir()
    return path


# numpy's .npz


def test_an_npz_comes_back_to_the_bit(dirs_of, tmp_path):
    dirs = dirs_of("llama").select(layers=[2])
    path = write_npz(dirs, tmp_path / "new" / "emotions.npz")
    assert path == only_file_in(tmp_path / "new")
    found = read_npz(path, 2)
    assert (found.concepts, found.layers) == (dirs.concepts, [2])
    assert torch.equal(found.vectors[2], dirs.vectors[2])
    assert found.residual_norms == {}, "the file has none"
    assert_raw(found)
    assert (found.provenance["file"], found.provenance["format"]) == ("emotions.npz", "npz")
    assert found.provenance["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in str(found.provenance)


def test_numpy_reads_the_npz_by_concept(tmp_path):
    dirs = made(layers=[40])
    with np.load(write_npz(dirs, str(tmp_path / "e.npz"))) as file:
        assert list(file) == dirs.concepts
        for row, concept in enumerate(dirs.concepts):
            assert file[concept].dtype == np.float32
            assert np.array_equal(file[concept], dirs.vectors[40][row].numpy())


def test_the_same_directions_give_the_same_npz_at_any_time(tmp_path):
    one = write_npz(made(layers=[1]), tmp_path / "one.npz")
    two = write_npz(made(layers=[1]), tmp_path / "two.npz")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8", np.longdouble])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_published_vectors_of_any_length_and_float_dtype_become_unit_vectors(tmp_path, dtype, save):
    rng = np.random.default_rng(0)
    vectors = {name: (7 * rng.normal(size=HIDDEN)).astype(dtype) for name in ("joy", "awe", "envy")}
    save(tmp_path / "published.npz", **vectors)
    found = read_npz(tmp_path / "published.npz", -1)
    assert (found.concepts, found.layers) == (["joy", "awe", "envy"], [-1])
    assert_unit(found)
    for row, vector in enumerate(vectors.values()):
        exact = vector.astype(np.float64)
        exact /= np.linalg.norm(exact)
        assert np.abs(found.vectors[-1][row].numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e25, 1e35])
def test_very_short_and_very_long_vectors_keep_their_direction(tmp_path, scale):
    exact = np.random.default_rng(0).normal(size=HIDDEN)
    np.savez(tmp_path / "scaled.npz", joy=scale * exact)
    found = read_npz(tmp_path / "scaled.npz", 0).vectors[0][0].numpy()
    assert np.abs(found - exact / np.linalg.norm(exact)).max() < 1e-6


@given(names=st.lists(st.text(), min_size=1, max_size=5, unique=True))
@example(names=["file", "allow_pickle", "kwds", "arr_0", "__proto__"])
@example(names=["saudade", "物の哀れ", "ça", "a b", " ", ".", "..", "calm.np", "calm.npy\n", "\n"])
@example(names=["CALM", "calm", "Calm"])
@example(names=["a/b"])
def test_every_name_is_refused_or_comes_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "e.npz"
    dirs = made(concepts=names, layers=[1], hidden=4)
    wrong = [n for n in names if not n or n.endswith(".npy") or set(n) & {"/", "\\", "\0"}]
    if wrong:
        with pytest.raises(AmygdalaError, match="not possible as keys") as raised:
            write_npz(dirs, path)
        assert all(repr(name) in str(raised.value) for name in wrong)
        assert not list(path.parent.iterdir())
    else:
        found = read_npz(write_npz(dirs, path), 1)
        assert found.concepts == names
        assert torch.equal(found.vectors[1], dirs.vectors[1])


@pytest.mark.parametrize(
    ("dirs", "message"),
    [
        (made(layers=[1, 3, 40]), r"have \[1, 3, 40\].*dirs.select\(layers=\[40\]\)"),
        (made(layers=[]), r"have \[\]"),
        (made(concepts=[], layers=[1]), "no concept to write"),
        (made(concepts=["calm", "calm"], layers=[1]), "select 'calm' once"),
        (made(concepts=[""], layers=[1]), "not possible as keys of a .npz: '':"),
        (made(concepts=["../calm"], layers=[1]), "keys of a .npz: '../calm':"),
        (made(concepts=["calm.npy", "calm"], layers=[1]), "keys of a .npz: 'calm.npy':"),
        (made(concepts=["half \ud800"], layers=[1]), r"keys of a .npz: 'half \\ud800':"),
    ],
)
def test_what_an_npz_cannot_hold_is_refused_and_nothing_is_written(tmp_path, dirs, message):
    with pytest.raises(AmygdalaError, match=message):
        write_npz(dirs, tmp_path / "e.npz")
    assert not list(tmp_path.iterdir())


def test_all_that_an_npz_cannot_hold_is_said_at_once(tmp_path):
    with pytest.raises(AmygdalaError, match=r"(?s)select\(layers=\[3\]\).*'a/b', 'c/d'"):
        write_npz(made(concepts=["a/b", "c/d"]), tmp_path / "e.npz")


GOOD = np.ones(HIDDEN, np.float32)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([{"code": 1}] * HIDDEN, dtype=object), "joy cannot be read.*allow_pickle"),
        (np.ones((HIDDEN, 1)), r"joy is of shape \(64, 1\), not \(hidden,\)"),
        (np.float32(1), r"joy is of shape \(\), not"),
        (np.ones(32), "joy has hidden size 32, but awe has 64"),
        (np.full(HIDDEN, np.nan), "joy holds NaN"),
        (np.where(np.arange(HIDDEN) == 3, -np.inf, 1), "joy holds NaN, or numbers that are inf"),
        (np.full(HIDDEN, 1e300), "joy holds NaN, or numbers that are infinite in float32"),
        (np.zeros(HIDDEN), "joy is zero in float32"),
        (np.full(HIDDEN, 1e-300), "joy is zero in float32"),
        (np.ones(HIDDEN, int), "joy holds int64, not floating point"),
        (np.ones(HIDDEN, complex), "joy holds complex128, not floating point"),
        (np.array(["1.0"] * HIDDEN), "joy holds <U3, not floating point"),
        (np.ones(0), "joy is zero"),
    ],
)
def test_an_array_that_is_no_direction_is_refused_by_name(tmp_path, bad, message):
    np.savez(tmp_path / "e.npz", joy=bad, awe=GOOD, envy=GOOD)
    with pytest.raises(ArtefactError, match=f"(?s)e.npz cannot be read as directions.*{message}"):
        read_npz(tmp_path / "e.npz", 1)


def test_all_bad_arrays_are_named_at_once(tmp_path):
    bad = {"a": np.zeros(HIDDEN), "b": GOOD * np.nan, "c": np.ones((2, 2)), "d": np.ones(3)}
    pickled = np.array([None], dtype=object)
    np.savez(tmp_path / "e.npz", **bad, pickled=pickled, good=GOOD, fine=GOOD)
    with pytest.raises(ArtefactError) as raised:
        read_npz(tmp_path / "e.npz", 1)
    named = [line.split()[0] for line in str(raised.value).splitlines()[1:]]
    assert sorted(named) == ["a", "b", "c", "d", "pickled"]


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = write_npz(made(concepts=["calm"], layers=[1]), tmp_path / "e.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("calm", archive.read("calm.npy"))
    with pytest.raises(ArtefactError, match="calm is there twice"):
        read_npz(path, 1)


def test_a_file_in_an_npz_that_is_no_array_is_refused(tmp_path):
    path = write_npz(made(layers=[1]), tmp_path / "e.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.md", "Vectors of emotions.")
    with pytest.raises(ArtefactError, match="README.md cannot be read.*magic"):
        read_npz(path, 1)


@pytest.mark.parametrize("claimed", [-3, 10**15, 10**30])
def test_an_array_that_claims_an_impossible_size_is_refused(tmp_path, claimed):
    header = {"descr": "<f4", "fortran_order": False, "shape": (claimed,)}
    with (
        zipfile.ZipFile(tmp_path / "e.npz", "w") as archive,
        archive.open("joy.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ArtefactError, match="(?s)e.npz cannot be read as directions.*joy cannot"):
        read_npz(tmp_path / "e.npz", 1)


def test_an_empty_npz_is_refused(tmp_path):
    np.savez(tmp_path / "e.npz")
    with pytest.raises(ArtefactError, match="the file is empty"):
        read_npz(tmp_path / "e.npz", 1)


@pytest.mark.parametrize("content", [b"", b"calm, afraid", b"PK\x03\x04"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "e.npz"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match="e.npz is not a .npz file, or is damaged"):
        read_npz(path, 1)


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "e.npy", GOOD)
    with pytest.raises(ArtefactError, match="e.npy is not a .npz file"):
        read_npz(tmp_path / "e.npy", 1)


@given(data=st.data())
def test_a_damaged_npz_is_refused_or_gives_directions(tmp_path_factory, data):
    path = write_npz(made(layers=[1], hidden=4), tmp_path_factory.mktemp("damaged") / "e.npz")
    damage(path, data)
    try:
        assert_unit(read_npz(path, 1))
    except ArtefactError as error:
        assert "e.npz" in str(error)


def test_a_layer_that_no_model_has_is_refused(tmp_path):
    path = write_npz(made(layers=[1]), tmp_path / "e.npz")
    with pytest.raises(AmygdalaError, match="no layer -2: .* -1 is the embeddings"):
        read_npz(path, -2)


def damage(path, data):
    """Cut the file short, or change one byte of it."""
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)


# Control vectors in GGUF


def test_a_control_vector_has_the_keys_and_tensors_that_llama_cpp_reads(tmp_path):
    dirs = made(layers=[1, 3, 12])
    path = write_gguf(dirs.select(concepts=["afraid"]), tmp_path / "new" / "a.gguf", "qwen3_5")
    assert path == only_file_in(tmp_path / "new")
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = {name: field.types[0].name for name, field in reader.fields.items()}
    assert {name: fields[name] for name in fields if not name.startswith("GGUF.")} == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "qwen3_5",
        "controlvector.layer_count": 3,
    }
    assert kinds["controlvector.model_hint"] == "STRING"
    assert kinds["controlvector.layer_count"] == "UINT32"
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.3", "direction.12"]
    for tensor, layer in zip(reader.tensors, dirs.layers, strict=True):
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [HIDDEN]
        expected = dirs.residual_norms[layer] * dirs.vectors[layer][1]
        assert np.array_equal(tensor.data, expected.numpy())


def test_a_control_vector_comes_back_but_for_rounding(dirs_of, tmp_path):
    dirs = dirs_of("llama").select(concepts=["proud"], layers=[2, 4])
    found = read_gguf(write_gguf(dirs, tmp_path / "proud.gguf", "llama"), "proud")
    assert (found.concepts, found.layers) == (["proud"], [2, 4])
    for layer in dirs.layers:
        assert torch.allclose(found.vectors[layer], dirs.vectors[layer], atol=1e-7)
        assert found.residual_norms[layer] == pytest.approx(dirs.residual_norms[layer], rel=1e-6)
    assert_raw(found)
    assert_unit(found)
    said = found.provenance
    assert (said["file"], said["format"], said["model_hint"]) == ("proud.gguf", "gguf", "llama")
    assert str(tmp_path) not in str(said)
    again = write_gguf(found, tmp_path / "again.gguf", "llama")
    twice = read_gguf(again, "proud")
    assert torch.allclose(twice.vectors[2], found.vectors[2], atol=1e-7)


def test_the_same_directions_give_the_same_gguf(tmp_path):
    dirs = made(concepts=["calm"])
    one, two = (write_gguf(dirs, tmp_path / name, "llama") for name in ("one.gguf", "two.gguf"))
    assert one.read_bytes() == two.read_bytes()


def test_llama_cpp_pushes_at_a_scale_as_we_do_at_that_strength(loaded, dirs_of, tmp_path):
    lm, dirs = loaded("llama"), dirs_of("llama").select(concepts=["calm"], layers=[2, 4])
    reader = GGUFReader(write_gguf(dirs, tmp_path / "calm.gguf", "llama"))
    # What llama.cpp does: after block il, counted from 0, scale * direction.<il> is added.
    pushes = {int(t.name.removeprefix("direction.")): torch.tensor(t.data) for t in reader.tensors}
    hooks = [
        lm.layers[il].register_forward_hook(lambda *args, push=push: args[-1] + 0.5 * push)
        for il, push in pushes.items()
    ]
    expected = logits(lm)
    for hook in hooks:
        hook.remove()
    with steer(lm, dirs, {"calm": 0.5}):
        assert torch.allclose(logits(lm), expected, atol=1e-4)
    with steer(lm, read_gguf(tmp_path / "calm.gguf", "calm"), {"calm": 0.5}):
        assert torch.allclose(logits(lm), expected, atol=1e-4)
    assert not torch.allclose(logits(lm), expected, atol=1e-2), "it has to do something"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [-1, 0, 1, 3]}, r"no layer before 1: leave out \[-1, 0\] .*layers=\[1, 3\]\)"),
        ({"layers": [0]}, r"no layer before 1, and there are only layers \[0\].*dirs.select"),
        ({"layers": []}, r"there are only layers \[\]"),
        ({"concepts": ["calm", "afraid"]}, r"have 2 \(calm, afraid\).*concepts=\['calm'\]\)"),
        ({"concepts": []}, "these directions have 0"),
        ({"norms": {}}, r"no residual norm for layers \[1, 3\]: extract the directions again"),
        ({"norms": {1: 1.0, 3: 0.0}}, r"layers \[3\]: extract the directions again"),
        ({"norms": {1: float("nan"), 3: 1.0}}, r"layers \[1\]: extract the directions again"),
        ({"model_type": ""}, "model_type is empty"),
    ],
)
def test_what_a_control_vector_cannot_hold_is_refused(tmp_path, changes, message):
    dirs = made(changes.get("concepts", ["calm"]), changes.get("layers", [1, 3]))
    dirs = dataclasses.replace(dirs, residual_norms=changes.get("norms", dirs.residual_norms))
    with pytest.raises(AmygdalaError, match=message):
        write_gguf(dirs, tmp_path / "c.gguf", changes.get("model_type", "llama"))
    assert not list(tmp_path.iterdir())


def test_all_that_a_control_vector_cannot_hold_is_said_at_once(tmp_path):
    dirs = dataclasses.replace(made(layers=[0, 1]), residual_norms={})
    with pytest.raises(AmygdalaError) as raised:
        write_gguf(dirs, tmp_path / "c.gguf", "")
    for part in ("leave out [0]", "residual norm for layers [0, 1]", "have 2", "model_type"):
        assert part in str(raised.value)


def foreign(path, tensors, architecture="controlvector", **keys):
    """A GGUF file of these tensors, written as another project would."""
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_string(f"controlvector.{key}", value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_sparse_control_vector_without_hint_is_read(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {f"direction.{n}": rng.normal(size=HIDDEN).astype(dtype) for n in (31, 7)}
    found = read_gguf(foreign(tmp_path / "c.gguf", tensors), "honest")
    assert found.layers == [7, 31]
    assert_unit(found)
    for layer in found.layers:
        vector = tensors[f"direction.{layer}"].astype(np.float64)
        assert found.residual_norms[layer] == pytest.approx(np.linalg.norm(vector), rel=1e-5)
        exact = vector / np.linalg.norm(vector)
        assert np.abs(found.vectors[layer][0].numpy() - exact).max() < 1e-6
    assert "model_hint" not in found.provenance


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensor direction.<layer>"),
        ({"output.weight": GOOD}, "no tensor direction.<layer>"),
        ({"direction.1": np.ones((2, HIDDEN), np.float32)}, r"direction.1 is of shape \(2, 64\)"),
        ({"direction.2": np.ones(8, np.float32)}, "direction.2 has hidden size 8, but .* has 64"),
        ({"direction.1": GOOD * np.nan}, "direction.1 holds NaN"),
        ({"direction.1": GOOD * np.inf}, "direction.1 holds NaN, or numbers that are infinite"),
        ({"direction.1": GOOD * 0}, "direction.1 is zero"),
        ({"direction.1": np.ones(HIDDEN, np.int32)}, "direction.1 holds int32, not floating"),
        ({"direction.last": GOOD}, "direction.last names no layer"),
        ({"direction.-1": GOOD}, "direction.-1 names no layer"),
    ],
)
def test_a_control_vector_that_holds_no_directions_is_refused(tmp_path, tensors, message):
    others = {"direction.5": GOOD, "direction.6": GOOD} if "no tensor" not in message else {}
    path = foreign(tmp_path / "c.gguf", tensors | others)
    with pytest.raises(ArtefactError, match=f"(?s)c.gguf cannot be read as directions.*{message}"):
        read_gguf(path, "calm")


def test_all_bad_tensors_are_named_at_once(tmp_path):
    bad = {"direction.1": GOOD * 0, "direction.2": GOOD[:3], "direction.x": GOOD}
    path = foreign(tmp_path / "c.gguf", bad | {"direction.3": GOOD, "direction.4": GOOD})
    with pytest.raises(ArtefactError) as raised:
        read_gguf(path, "calm")
    named = {line.split()[0] for line in str(raised.value).splitlines()[1:]}
    assert named == {"direction.1", "direction.2", "direction.x"}


def test_a_gguf_of_another_architecture_is_refused_by_its_name(tmp_path):
    path = foreign(tmp_path / "model.gguf", {"direction.1": GOOD}, architecture="llama")
    with pytest.raises(ArtefactError, match="architecture 'llama', not 'controlvector'"):
        read_gguf(path, "calm")


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"GGUF\x03\0\0\0", b"not a GGUF file"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    path = tmp_path / "c.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match="c.gguf is not a GGUF file, or is damaged"):
        read_gguf(path, "calm")


@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_gguf_is_refused_or_gives_directions(tmp_path_factory, data):
    dirs = made(concepts=["calm"], hidden=4)
    path = write_gguf(dirs, tmp_path_factory.mktemp("damaged") / "c.gguf", "llama")
    damage(path, data)
    try:
        assert_unit(read_gguf(path, "calm"))
    except ArtefactError as error:
        assert "c.gguf" in str(error)


# Both kinds of file


@pytest.mark.parametrize(
    ("write", "fails"),
    [
        (write_npz, "numpy.lib.format.write_array"),
        (
            lambda dirs, path: write_gguf(dirs, path, "llama"),
            "gguf.GGUFWriter.write_tensors_to_file",
        ),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, write, fails):
    path = tmp_path / "vectors"
    path.write_bytes(b"old")

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="no space left"):
        write(made(concepts=["calm"], layers=[1]), path)
    assert only_file_in(tmp_path).read_bytes() == b"old"


@pytest.mark.parametrize("read", [lambda p: read_npz(p, 1), lambda p: read_gguf(p, "calm")])
def test_a_missing_file_or_a_folder_is_refused_by_its_path(tmp_path, read):
    with pytest.raises(ArtefactError, match="nowhere is not there"):
        read(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="is not there, or is no file"):
        read(str(tmp_path))


def test_what_was_read_can_be_saved_and_loaded(tmp_path):
    found = read_npz(write_npz(made(layers=[3]), tmp_path / "e.npz"), 3)
    again = Directions.load(found.save(tmp_path / "folder"))
    assert again.provenance == found.provenance
    assert torch.equal(again.vectors[3], found.vectors[3])


def test_the_library_is_imported_without_the_libraries_it_exchanges_with(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    importlib.reload(exchange)


# steering-vectors

REASON = "see requirements-nodeps.txt"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_the_multiplier_of_steering_vectors_is_our_strength(loaded, dirs_of, family, strength):
    pytest.importorskip("steering_vectors", reason=REASON)
    lm, dirs = loaded(family), dirs_of(family)
    vector = to_steering_vector(dirs, "afraid")
    with vector.apply(lm.model, multiplier=strength):
        theirs = logits(lm)
    with steer(lm, dirs, {"afraid": strength}):
        ours = logits(lm)
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert not torch.allclose(logits(lm), ours, atol=1e-2), "it has to do something"


def test_a_steering_vector_is_as_long_as_the_residual_stream():
    library = pytest.importorskip("steering_vectors", reason=REASON)
    dirs = made(layers=[0, 3])
    vector = to_steering_vector(dirs, "afraid")
    assert isinstance(vector, library.SteeringVector)
    assert vector.layer_type == "decoder_block"
    assert list(vector.layer_activations) == [0, 3]
    for layer, activation in vector.layer_activations.items():
        assert torch.equal(activation, dirs.residual_norms[layer] * dirs.vectors[layer][1])


def test_steering_vectors_come_back_but_for_rounding(dirs_of):
    pytest.importorskip("steering_vectors", reason=REASON)
    dirs = dirs_of("llama")
    found = from_steering_vectors({c: to_steering_vector(dirs, c) for c in dirs.concepts})
    assert (found.concepts, found.layers) == (dirs.concepts, dirs.layers)
    for layer in dirs.layers:
        assert torch.allclose(found.vectors[layer], dirs.vectors[layer], atol=1e-7)
        assert found.residual_norms[layer] == pytest.approx(dirs.residual_norms[layer], rel=1e-6)
    assert_raw(found)
    assert_unit(found)
    assert found.provenance["format"] == "steering-vectors"


def test_the_residual_norm_of_vectors_of_other_lengths_is_their_mean():
    library = pytest.importorskip("steering_vectors", reason=REASON)
    axes = torch.eye(HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    given_vectors = {
        "calm": library.SteeringVector({2: 3 * axes[0]}),
        "afraid": library.SteeringVector({2: 5 * axes[1]}),
    }
    found = from_steering_vectors(given_vectors)
    assert found.residual_norms == {2: 4.0}
    assert torch.equal(found.vectors[2], torch.eye(HIDDEN)[:2])


def test_without_steering_vectors_the_command_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    with pytest.raises(AmygdalaError) as raised:
        to_steering_vector(made(), "calm")
    assert str(raised.value) == "pip install --no-deps -r requirements-nodeps.txt"


@pytest.mark.parametrize(
    ("dirs", "message"),
    [
        (made(layers=[-1, 0, 3]), r"leave out \[-1\] with dirs.select\(layers=\[0, 3\]\)"),
        (made(layers=[-1]), r"outputs of blocks only, and there are only layers \[-1\]"),
        (dataclasses.replace(made(), residual_norms={1: 1.0}), r"\[3\]: extract the directions"),
        (made(concepts=["proud"]), "no direction for 'calm': there are proud"),
    ],
)
def test_what_a_steering_vector_cannot_hold_is_refused(dirs, message):
    pytest.importorskip("steering_vectors", reason=REASON)
    with pytest.raises(AmygdalaError, match=message):
        to_steering_vector(dirs, "calm")


ROW = torch.ones(HIDDEN)


@pytest.mark.parametrize(
    ("activations", "layer_type", "message"),
    [
        ({1: ROW, 2: ROW}, "mlp", "proud is of mlp: .*decoder_block"),
        ({1: ROW}, "decoder_block", r"proud has layers \[1\], but calm has \[1, 2\]"),
        ({1: ROW, -1: ROW}, "decoder_block", r"proud has layers \[-1\]: count them from 0"),
        ({}, "decoder_block", r"proud has layers \[\], but calm has \[1, 2\]"),
        ({1: ROW, 2: ROW[:8]}, "decoder_block", "proud at layer 2 has hidden size 8, but calm at"),
        ({1: ROW[None], 2: ROW}, "decoder_block", r"proud at layer 1 is of shape \(1, 64\)"),
        ({1: ROW, 2: ROW * 0}, "decoder_block", "proud at layer 2 is zero"),
        ({1: ROW, 2: ROW / 0}, "decoder_block", "proud at layer 2 holds NaN"),
    ],
)
def test_steering_vectors_that_do_not_fit_are_refused_by_name(activations, layer_type, message):
    library = pytest.importorskip("steering_vectors", reason=REASON)
    vectors = {name: library.SteeringVector({1: ROW, 2: ROW}) for name in ("calm", "afraid")}
    vectors["proud"] = library.SteeringVector(activations, layer_type)
    with pytest.raises(AmygdalaError, match=message):
        from_steering_vectors(vectors)


def test_no_steering_vectors_give_no_directions():
    with pytest.raises(AmygdalaError, match="no steering vector with a layer"):
        from_steering_vectors({})


@pytest.mark.parametrize("annotated", [read_npz, write_npz, read_gguf, write_gguf])
def test_annotations_can_be_resolved(annotated):
    assert get_type_hints(annotated)
