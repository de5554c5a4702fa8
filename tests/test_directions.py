"""Directions are what the formula says, are found where they were planted, and outlive saving."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import activations, labelled
from safetensors.torch import load_file

from amygdala_lib import Activations, Directions, capture, extract, steering
from amygdala_lib.capture import residual_stream
from amygdala_lib.directions import method, methods, pooled
from amygdala_lib.errors import AmygdalaError, ArtefactError
from amygdala_lib.readout import Readout

HIDDEN = 16


@pytest.fixture(scope="module")
def acts(loaded, corpus):
    return capture(loaded("qwen3_5"), corpus, [0, 2, 4], pool="mean", progress=False)


@pytest.fixture(scope="module")
def dirs(acts, corpus):
    return extract(acts, corpus)


# The formula

LABELS = st.lists(st.sampled_from(["calm", "afraid", "proud", None]), min_size=3, max_size=30)


@given(labels=LABELS.filter(lambda found: any(found) and len(set(found)) > 1), seed=st.integers(0))
def test_pooled_is_the_difference_of_means(labels, seed):
    corpus = labelled(labels)
    rng = np.random.default_rng(seed)
    # A large mean that all share, as real activations have.
    values = rng.normal(size=(len(labels), HIDDEN)) + 50 * rng.normal(size=HIDDEN)
    values = values.astype(np.float32)
    found = pooled(torch.from_numpy(values), corpus)
    for row, concept in enumerate(corpus.concepts):
        chosen = np.array([label == concept for label in labels])
        exact = values.astype(np.float64)
        exact = exact[chosen].mean(0) - exact[~chosen].mean(0)
        assert np.abs(found[row].numpy() - exact).max() < 1e-4


def test_pooled_agrees_with_steering_vectors_on_equal_pairs():
    library = pytest.importorskip("steering_vectors", reason="see requirements-nodeps.txt")
    corpus = labelled(["calm"] * 20 + ["afraid"] * 20)
    values = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0)) + 10
    expected = library.mean_aggregator()(values[:20], values[20:])
    found = extract(activations(corpus, values), corpus).vectors[2][corpus.concepts.index("calm")]
    cosine = torch.cosine_similarity(found.double(), expected.double(), dim=0)
    assert cosine > 1 - 1e-6


@given(seed=st.integers(0), shift=st.floats(-100, 100))
def test_a_planted_direction_is_recovered(seed, shift):
    generator = torch.Generator().manual_seed(seed % 2**63)
    labels = ["calm", "afraid", None] * 40
    corpus = labelled(labels)
    planted = torch.eye(HIDDEN)[:2]
    values = 0.1 * torch.randn(len(labels), HIDDEN, generator=generator) + shift
    for concept, direction in zip(("calm", "afraid"), planted, strict=True):
        values[[label == concept for label in labels]] += 3 * direction
    found = extract(activations(corpus, values), corpus).vectors[2]
    cosines = torch.cosine_similarity(found, planted[[1, 0]] - 0.5 * planted[[0, 1]])
    assert (cosines > 0.99).all()


def test_rows_are_unit_and_in_the_order_of_the_concepts(dirs, corpus):
    assert dirs.concepts == corpus.concepts == ["calm", "afraid", "proud"]
    assert dirs.layers == [0, 2, 4]
    assert dirs.hidden_size == 64
    for layer in dirs.layers:
        assert dirs.vectors[layer].dtype == torch.float32
        assert torch.allclose(dirs.vectors[layer].norm(dim=1), torch.ones(3), atol=1e-6)
        assert [dirs.index(concept) for concept in dirs.concepts] == [0, 1, 2]


def test_positives_project_higher_than_negatives(dirs, acts, corpus):
    for layer in dirs.layers:
        projections = acts[layer] @ dirs.vectors[layer].T
        for column, concept in enumerate(corpus.concepts):
            positive = projections[corpus.positives(concept), column].mean()
            assert positive > projections[corpus.negatives(concept), column].mean()


def test_means_and_deviations_standardise_the_texts_they_came_from(dirs, acts):
    for layer in dirs.layers:
        scores = Readout(dirs).project(acts[layer], layer)
        assert torch.allclose(scores.mean(0), torch.zeros(3), atol=1e-4)
        assert torch.allclose(scores.std(0), torch.ones(3), atol=1e-4)
        assert dirs.residual_norms[layer] == acts.residual_norms[layer]


def test_similarity_is_the_table_of_cosines(dirs):
    table = dirs.similarity(2)
    expected = torch.cosine_similarity(dirs.vectors[2][:, None], dirs.vectors[2][None], dim=-1)
    assert torch.allclose(table, expected, atol=1e-6)


def test_the_same_texts_give_the_same_bytes(lm, corpus, tmp_path):
    for folder in ("one", "two"):
        again = capture(lm, corpus, [0, 2], cache=None, progress=False)
        extract(again, corpus).save(tmp_path / folder)
    for file in ("readout.safetensors", "readout.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_provenance_says_all_that_is_needed_to_make_it_again(dirs, acts, corpus, lm):
    said = dirs.provenance
    assert said["format_version"] == 1
    assert said["versions"]["torch"] == torch.__version__
    assert (said["model"], said["revision"]) == (lm.name, lm.revision)
    assert said["weight_hash"] == acts.model_hash
    assert said["corpus_hash"] == corpus.hash
    assert said["method"] == "pooled"
    assert (said["pool"], said["skip"], said["chat_template"]) == ("mean", 0, False)
    assert said["n_layers"] == 5


# Methods


def test_a_registered_method_is_found_by_its_name(acts, corpus):
    @method("first minus last")
    def first_minus_last(values, labels):
        found = [labels.positives(concept) for concept in labels.concepts]
        return torch.stack([values[rows[0]] - values[rows[-1]] for rows in found])

    try:
        made = extract(acts, corpus, method="first minus last")
    finally:
        del methods["first minus last"]
    rows = corpus.positives("afraid")
    difference = acts[2][rows[0]] - acts[2][rows[-1]]
    assert torch.allclose(made.vectors[2][1], difference / difference.norm(), atol=1e-6)
    assert made.provenance["method"] == "first minus last"


def test_a_method_that_returns_another_shape_is_named(acts, corpus):
    method("one for all")(lambda values, labels: values[:1])
    try:
        with pytest.raises(AmygdalaError, match=r"one for all gave \(1, 64\).*\(3, 64\)"):
            extract(acts, corpus, method="one for all")
    finally:
        del methods["one for all"]


def test_an_unknown_method_is_refused_with_those_there_are(acts, corpus):
    with pytest.raises(AmygdalaError, match="no method 'poled': choose one of .*pooled"):
        extract(acts, corpus, method="poled")


def test_activations_of_other_texts_are_refused(acts, corpus):
    fewer = dataclasses.replace(acts, texts=acts.texts[1:])
    with pytest.raises(AmygdalaError, match="1 of its 13 texts are missing.*capture"):
        extract(fewer, corpus)


def test_activations_of_every_token_are_refused(lm, corpus):
    tokens = capture(lm, corpus, [2], pool="tokens", progress=False)
    with pytest.raises(AmygdalaError, match="pool='last' or 'mean'"):
        extract(tokens, corpus)


@given(n=st.integers(3, 60), seed=st.integers(0))
def test_no_direction_is_made_where_all_texts_are_the_same(n, seed):
    corpus = labelled((["calm", "afraid", None] * n)[:n])
    one = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed % 2**63))
    with pytest.raises(AmygdalaError, match="no direction at layer 2 for afraid, calm"):
        extract(activations(corpus, one.repeat(n, 1)), corpus)


def test_the_embedding_of_the_same_last_token_gives_no_direction(lm, corpus):
    same_end = dataclasses.replace(
        corpus,
        entries=[dataclasses.replace(e, text=e.text.rstrip(".!") + ".") for e in corpus.entries],
    )
    with pytest.raises(AmygdalaError, match="no direction at layer -1 for calm, afraid, proud"):
        extract(capture(lm, same_end, [-1], progress=False), same_end)


# Files


def test_saving_and_loading_is_exact(dirs, tmp_path):
    assert dirs.save(tmp_path / "new" / "folder", notebook="02") == tmp_path / "new" / "folder"
    loaded = Directions.load(tmp_path / "new" / "folder")
    assert loaded.concepts == dirs.concepts
    assert loaded.residual_norms == dirs.residual_norms
    assert loaded.provenance == dirs.provenance | {"notebook": "02"}
    for layer in dirs.layers:
        for part in ("vectors", "means", "stds"):
            assert torch.equal(getattr(loaded, part)[layer], getattr(dirs, part)[layer])
    again = loaded.save(tmp_path / "again")
    for file in ("readout.safetensors", "readout.json"):
        assert (again / file).read_bytes() == (tmp_path / "new" / "folder" / file).read_bytes()


def test_the_files_are_as_people_depend_on_them(dirs, tmp_path):
    dirs.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "readout.json", "readout.safetensors",
    ]  # fmt: skip
    description = json.loads((tmp_path / "readout.json").read_text())
    assert description["concepts"] == ["calm", "afraid", "proud"]
    assert description["layers"] == [0, 2, 4]
    assert (description["hidden_size"], description["dtype"]) == (64, "float32")
    tensors = load_file(tmp_path / "readout.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        f"layer_{layer}.{part}": (3, 64) if part == "vectors" else (3,)
        for layer in (0, 2, 4)
        for part in ("vectors", "mean", "std")
    }


def test_a_fact_that_json_cannot_hold_leaves_the_old_files(dirs, tmp_path):
    dirs.save(tmp_path, notebook="02")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    turned = dataclasses.replace(dirs, vectors={k: -v for k, v in dirs.vectors.items()})
    with pytest.raises(ArtefactError, match="PosixPath"):
        turned.save(tmp_path, notebook=Path("02.ipynb"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit(folder, **changes):
    description = json.loads((folder / "readout.json").read_text()) | changes
    kept = {key: value for key, value in description.items() if value is not None}
    (folder / "readout.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": ["calm", "afraid"]}, r"says \(2, 64\).*\(3, 64\).*not from one run"),
        ({"hidden_size": 32}, r"says \(3, 32\)"),
        ({"concepts": ["afraid", "calm", "proud"]}, "of other concepts.*not from one run"),
        ({"layers": [0, 1, 3]}, "lacks layer_1.vectors, layer_3.vectors"),
        ({"concepts": None, "hidden_size": None}, "lacks concepts, hidden_size"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(dirs, tmp_path, changes, message):
    edit(dirs.save(tmp_path), **changes)
    with pytest.raises(ArtefactError, match=message):
        Directions.load(tmp_path)


@pytest.mark.parametrize("file", ["readout.json", "readout.safetensors"])
def test_a_missing_or_damaged_file_says_which_step_writes_it(dirs, tmp_path, file):
    path = dirs.save(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=f"{file} is damaged.*notebook 02"):
        Directions.load(tmp_path)
    path.unlink()
    with pytest.raises(ArtefactError, match=f"{file} is not there.*notebook 02"):
        Directions.load(tmp_path)


def test_a_concept_without_direction_is_refused_with_those_there_are(dirs):
    with pytest.raises(AmygdalaError, match="no direction for 'clam': there are calm, afraid"):
        dirs.index("clam")


# The annotations


@pytest.mark.parametrize(
    "annotated",
    [
        Activations, Activations.__getitem__, capture, residual_stream, Directions, extract,
        Directions.similarity, pooled, Readout.project, steering.steer,
    ],
)  # fmt: skip
def test_shapes_in_annotations_can_be_resolved(annotated):
    assert typing.get_type_hints(annotated)
