"""Any decoder or encoder is found, loaded and named; what cannot be loaded says how to mend it."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import transformers as hf
from conftest import DELTA_NET, FAMILIES, SIZES
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib import models
from amygdala_lib.errors import AmygdalaError, ModelError
from amygdala_lib.models import (
    check_layers,
    default_layers,
    depth_label,
    find_layers,
    load_model,
    weight_hash,
)


@pytest.fixture
def copied(model_folder, tmp_path):
    """A folder with a saved Llama, to be spoilt."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "llama"))


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_from_its_folder_ready_to_be_read(family, loaded, model_folder):
    lm = loaded(family)
    assert lm.name == family
    assert len(lm.layers) == SIZES["num_hidden_layers"]
    assert lm.hidden_size == SIZES["hidden_size"]
    assert lm.device == torch.device("cpu")
    assert lm.dtype == torch.float32
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.revision == weight_hash(lm.model)
    assert family in str(lm) and "as asked" in str(lm)
    torch.rand(1)  # BERT's pooler is drawn at random, but not from here
    assert load_model(model_folder(family), device="cpu").revision == lm.revision


def test_the_folder_may_be_a_string_a_relative_path_or_the_place_one_is_in(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    names = {load_model(name, device="cpu").name for name in ("llama", str(copied), Path("llama"))}
    monkeypatch.chdir(copied)
    assert names | {load_model(".", device="cpu").name} == {"llama"}


def test_dtype_and_device_are_as_asked_and_the_reason_says_so(model_folder):
    lm = load_model(model_folder("llama"), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    assert "on cpu, as asked" in lm.reason and "bfloat16, as asked" in lm.reason


def test_the_device_is_chosen_with_a_reason(model_folder):
    lm = load_model(model_folder("llama"))
    device, dtype, reason = models.choose_device()
    assert (lm.device.type, lm.dtype, lm.reason) == (device.type, dtype, reason)
    assert str(dtype).removeprefix("torch.") in reason and ":" in reason


def test_loading_leaves_the_callers_random_numbers_alone(model_folder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_model(model_folder("bert"), device="cpu")  # whose pooler is not in the checkpoint
    assert torch.equal(torch.rand(3), expected)


# Layers


@pytest.fixture(scope="module")
def vision_language_model():
    vision = {"depth": 5, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64}
    vision |= {"out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16}
    text = SIZES | DELTA_NET | {"vocab_size": 400}
    torch.manual_seed(0)
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=text, vision_config=vision)
    )


def test_a_vision_language_model_is_read_in_its_text_tower(vision_language_model):
    assert len(vision_language_model.model.visual.blocks) == SIZES["num_hidden_layers"]
    layers = find_layers(vision_language_model)
    assert layers is vision_language_model.model.language_model.layers


def test_a_vision_language_folder_loads_as_its_text_tower(
    vision_language_model, model_folder, tmp_path
):
    vision_language_model.save_pretrained(tmp_path)
    for file in model_folder("qwen3_5").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    lm = load_model(tmp_path, device="cpu")
    stored = vision_language_model.model.language_model.layers[4].mlp.up_proj.weight
    assert torch.equal(lm.layers[4].mlp.up_proj.weight, stored)


def test_layers_are_found_in_a_model_without_a_head(loaded):
    assert find_layers(loaded("qwen3").model.model) is loaded("qwen3").layers


def test_a_model_without_layers_is_refused_with_what_was_seen():
    stages = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    with pytest.raises(ModelError, match="ResNetModel.*no module list.*encoder.stages"):
        find_layers(hf.ResNetModel(hf.ResNetConfig(**stages)))


@given(n=st.integers(1, 200))
def test_default_layers_exist_and_two_thirds_of_depth_is_among_them(n):
    layers = default_layers(n)
    assert check_layers(None, n) == layers == sorted(set(layers))
    assert layers[0] >= 0 and layers[-1] < n
    assert min(abs((layer + 1) / n - 2 / 3) for layer in layers) <= 0.5 / n + 1e-9


@given(layers=st.lists(st.integers(-1, 63), min_size=1))
def test_layers_come_back_ascending_each_once_and_as_plain_integers(layers):
    checked = check_layers(np.array(layers), 64)
    assert checked == sorted(set(layers))
    json.dumps(checked)


def test_every_layer_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"\[-2, 5, 9\].*0 to 4"):
        check_layers([0, 9, -2, -1, 5], 5)


@pytest.mark.parametrize("layers", [3, [1.5], ["1"], [None]])
def test_layers_that_are_no_whole_numbers_are_refused(layers):
    with pytest.raises(ModelError, match="list of whole numbers"):
        check_layers(layers, 5)


def test_no_layers_at_all_are_refused():
    with pytest.raises(ModelError, match="choose from 0 to 4"):
        check_layers([], 5)


@pytest.mark.parametrize(
    ("layer", "n", "label"),
    [(40, 64, "layer 40 of 64 (63%)"), (0, 8, "layer 0 of 8 (0%)"), (-1, 8, "embeddings")],
)
def test_layers_are_named_with_their_depth(layer, n, label):
    assert depth_label(layer, n) == label


# The hash of the weights


@pytest.fixture(scope="module")
def own_copy(loaded):
    return copy.deepcopy(loaded("qwen3_5").model)


@given(data=st.data())
def test_one_bit_anywhere_changes_the_hash_and_its_return_restores_it(own_copy, data):
    before = weight_hash(own_copy)
    parameter = data.draw(st.sampled_from(list(own_copy.parameters())))
    bits = parameter.data.view(-1).view(torch.int32)
    place, bit = data.draw(st.integers(0, len(bits) - 1)), data.draw(st.integers(0, 31))
    flip = torch.tensor([1 << bit], dtype=torch.int64).to(torch.int32)[0]
    bits[place] ^= flip
    changed = weight_hash(own_copy)
    bits[place] ^= flip
    assert changed != before
    assert weight_hash(own_copy) == before


def test_two_elements_that_change_places_change_the_hash(own_copy):
    before = weight_hash(own_copy)
    weight = own_copy.model.layers[0].mlp.up_proj.weight.data
    weight[0, :2] = weight[0, :2].flip(0)
    changed = weight_hash(own_copy)
    weight[0, :2] = weight[0, :2].flip(0)
    assert changed != before


def test_the_hash_tells_dtypes_apart_and_outlives_saving(own_copy, tmp_path):
    narrow = copy.deepcopy(own_copy).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert weight_hash(narrow) == weight_hash(again) != weight_hash(own_copy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_hash_is_the_same_on_a_gpu(own_copy):
    assert weight_hash(copy.deepcopy(own_copy).cuda()) == weight_hash(own_copy)


# What cannot be loaded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Path("nowhere"), "no model folder nowhere: give a folder"),
        ("runs/a/b/c", "no model folder runs/a/b/c: give a folder"),
        ("what is this?", "give a folder, a Hugging Face id, or 'demo'"),
        ("some-org/some-model", "some-org/some-model is neither a folder here.*offline"),
    ],
)
def test_a_name_that_stands_for_no_model_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_missing_bundled_model_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="make demo-model"):
        load_model("demo")


def spoil(folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json describes no model"),
        ("config.json", b"{}", "config.json describes no model"),
        ("config.json", b'{"model_type": "of tomorrow"}', "or upgrade transformers"),
        ("model.safetensors", None, "save or download its weights"),
        ("model.safetensors", b"\x80\0\0\0\0\0\0\0{", "save or download its weights"),
        ("tokenizer.json", b"{", "save or download its weights and tokenizer"),
    ],
)
def test_a_spoilt_folder_is_refused_by_its_path(copied, file, content, message):
    spoil(copied, file, content)
    with pytest.raises(ModelError, match=message) as refused:
        load_model(copied, device="cpu")
    assert str(copied) in str(refused.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(copied, device):
    with pytest.raises(ModelError, match=f"no device '{device}' here.*device='cpu'"):
        load_model(copied, device=device)


def test_a_model_too_large_for_memory_is_refused_before_it_is_read(copied, monkeypatch):
    stored = (copied / "model.safetensors").stat().st_size
    # Damaged, so that an attempt to read it would fail in another way.
    (copied / "model.safetensors").write_bytes(bytes(stored))
    memory = SimpleNamespace(available=stored - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ModelError, match="llama needs .* GB as float32.*dtype=torch.bfloat16"):
        load_model(copied, device="cpu")


def test_a_narrower_dtype_needs_less_memory(copied, monkeypatch):
    stored = (copied / "model.safetensors").stat().st_size
    memory = SimpleNamespace(available=stored * 2 // 3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert load_model(copied, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_stored_twice_are_counted_once(copied, monkeypatch):
    shutil.copy(copied / "model.safetensors", copied / "consolidated.safetensors")
    memory = SimpleNamespace(available=(copied / "model.safetensors").stat().st_size * 3 // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert load_model(copied, device="cpu").name == "llama"


def test_all_errors_can_be_caught_at_once():
    assert issubclass(ModelError, AmygdalaError)
