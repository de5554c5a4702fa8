"""A readout needs little to be read, and says how strongly each concept shows."""

import json

import pytest
import torch
from safetensors.torch import save_file

from amygdala_lib import Readout, capture, extract, steer
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
