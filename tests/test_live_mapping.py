"""vLLM's tensors become views by their Hugging Face names, all of them, or none.

What vLLM holds is on record in `tests/data/vllm_names`: names, shapes and SHA-256 of tiny models
whose every element is known. The tensors are put together here by the rules of vLLM's loaders, and
must have those hashes, before they are mapped back.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from amygdala_lib import live
from amygdala_lib.errors import LiveError
from amygdala_lib.live.mapping import FAMILIES, map_weights
from tests.data.vllm_names.dump import configurations, digest, fill

RECORDS = Path(__file__).parent / "data" / "vllm_names"
NAMES = [path.stem for path in sorted(RECORDS.glob("*.json"))]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@cache
def record(name):
    return json.loads((RECORDS / f"{name}.json").read_text())


def config_of(name):
    content = dict(record(name)["config"])
    return AutoConfig.for_model(content.pop("model_type"), **content)


@cache
def disk(name):
    """The parameters of the recorded model, by their names in the language model, as saved."""
    config = config_of(name)
    several = config.get_text_config() is not config
    kind = AutoModelForImageTextToText if several else AutoModelForCausalLM
    model = kind.from_config(config, dtype=getattr(torch, record(name)["dtype"]))
    fill(model)
    return {
        key.replace("model.language_model.", "model."): value.detach()
        for key, value in model.named_parameters()
        if "visual" not in key
    }


def wanted_of(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    return {key: tuple(value.shape) for key, value in model.named_parameters()}


def as_vllm_holds(name, tensors=None):
    """Copies of a language model's tensors by vLLM's names, tied ones under both."""
    held = {key: tensor.clone() for key, tensor in (tensors or disk(name)).items()}

    def merge(pattern, parts, merged):
        for key in [key for key in held if re.search(pattern.format(parts[0]), key)]:
            found = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            rows = torch.cat([held.pop(part) for part in found])
            held[key.replace(f".{parts[0]}.", f".{merged}.")] = rows

    merge(r"self_attn\.{}\.", ["q_proj", "k_proj", "v_proj"], "qkv_proj")
    merge(r"(mlp|shared_expert)\.{}\.", ["gate_proj", "up_proj"], "gate_up_proj")
    merge(r"linear_attn\.{}\.", ["in_proj_qkv", "in_proj_z"], "in_proj_qkvz")
    merge(r"linear_attn\.{}\.", ["in_proj_b", "in_proj_a"], "in_proj_ba")
    for key in list(held):
        if key.endswith("A_log"):
            held[key] = held[key].float()
        elif key.endswith(("embed_tokens.weight", "lm_head.weight")):
            held[key] = nn.functional.pad(held[key], (0, 0, 0, -len(held[key]) % 64))
        elif key.endswith("experts.gate_up_proj"):
            held[key.replace("gate_up_proj", "routed_experts.w13_weight")] = held.pop(key)
        elif key.endswith("experts.down_proj"):
            held[key.replace("down_proj", "routed_experts.w2_weight")] = held.pop(key)
    if config_of(name).get_text_config().tie_word_embeddings:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    prefix = "language_model." if "vision" in name else ""
    return {f"{prefix}{key}": value for key, value in held.items()}


def test_what_was_recorded_is_what_is_supported():
    assert {config_of(name).get_text_config().model_type for name in NAMES} == FAMILIES
    assert set(NAMES) == set(configurations())
    assert {record(name)["vllm"] for name in NAMES} == {"0.32.0"}


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_of_this_test_give_what_vllm_was_seen_to_hold(name):
    held, seen = as_vllm_holds(name), set()
    for tensor in record(name)["served"]:
        if tensor["names"][0].startswith("visual."):
            continue
        known = [key for key in tensor["names"] if key in held]  # it has several for some
        assert known, tensor["names"]
        for key in known:
            assert list(held[key].shape) == tensor["shape"], key
            assert str(held[key].dtype) == f"torch.{tensor['dtype']}", key
            assert digest(held[key]) == tensor["sha256"], key
        seen.update(known)
    assert seen == set(held)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_a_view_with_the_values_on_disk(name):
    served, wanted = as_vllm_holds(name), wanted_of(name)
    views = map_weights(config_of(name), served, wanted)
    assert set(views) == set(wanted)
    places = {tensor.untyped_storage().data_ptr() for tensor in served.values()}
    for key, view in views.items():
        assert torch.equal(view.to(disk(name)[key].dtype), disk(name)[key]), key
        assert view.untyped_storage().data_ptr() in places
    versions = {key: view._version for key, view in views.items()}
    for view in views.values():
        view.fill_(7)
    for key, view in views.items():
        assert view._version == versions[key] + 1, key  # no other view's write is counted with it
    padding = {"embed_tokens", "lm_head"}
    for key, tensor in served.items():
        rows = wanted_of(name)["model.embed_tokens.weight"][0]
        used = tensor[:rows] if key.split(".")[-2] in padding else tensor
        assert (used == 7).all(), key


@pytest.mark.parametrize("name", ["qwen3_5_tied", "qwen3_5_vision", "qwen3_next"])
def test_a_server_with_vllms_names_is_attached_to_and_computes_the_same(name, tmp_path):
    config = config_of(name)
    torch.manual_seed(0)
    text = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tensors = {key: value.detach() for key, value in text.named_parameters()}
    config.save_pretrained(tmp_path / "model")
    runtime = live.private_folder(tmp_path / "runtime")
    module = as_module(as_vllm_holds(name, tensors))
    with live.export_weights(module, runtime / "weights.json", model_name=str(tmp_path / "model")):
        content = json.loads((runtime / "weights.json").read_text())
        (runtime / "weights.json").write_text(json.dumps(content | {"naming": "vllm"}))
        attached = live.attach(runtime / "weights.json")
        with torch.no_grad():
            assert torch.equal(attached(IDS).logits, text(IDS).logits)
        assert type(attached) is type(text)
        tied = config.get_text_config().tie_word_embeddings
        assert (attached.lm_head.weight is attached.model.embed_tokens.weight) == tied


def as_module(tensors):
    """A module with parameters of these names."""
    root = nn.Module()
    parameters = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        parameter = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
        module.register_parameter(last, parameter)
    return root


def test_plain_hugging_face_names_are_taken_as_they_are():
    config = config_of("qwen3")
    tensors = disk("qwen3")
    wanted = wanted_of("qwen3")
    views = map_weights(config, tensors, wanted, naming="transformers")
    assert all(torch.equal(views[key], tensors[key]) for key in wanted)
    with pytest.raises(LiveError, match=r"embed_tokens.weight is \[448, 64\] in the server"):
        map_weights(config, as_vllm_holds("qwen3"), wanted, naming="transformers")


# What is refused

LAYER = "model.layers.0."


def without(served, key):
    return {name: tensor for name, tensor in served.items() if name != key}


WRONG = {
    "a tensor is missing": (
        lambda s: without(s, f"{LAYER}self_attn.o_proj.weight"),
        [rf"{LAYER}self_attn.o_proj.weight \[64, 64\] is not served"],
    ),
    "a merged tensor is missing": (
        lambda s: without(s, f"{LAYER}self_attn.qkv_proj.weight"),
        [
            rf"{LAYER}self_attn.{part}_proj.weight \[\d+, 64\] is not served as "
            rf"{LAYER}self_attn.qkv_proj.weight"
            for part in "qkv"
        ],
    ),
    "a tensor is left over": (
        lambda s: s | {f"{LAYER}mlp.extra.weight": torch.zeros(2, 3)},
        [rf"{LAYER}mlp.extra.weight \[2, 3\] is served and not used"],
    ),
    "a shard of a tensor-parallel server": (
        lambda s: {key: tensor[: len(tensor) // 2] for key, tensor in s.items()},
        [
            rf"{LAYER}self_attn.q_proj.weight is in .* \[64, 64\], which is not \[128, 64\]",
            r"embed_tokens.weight is \[224, 64\] in the server, not \[401, 64\]",
            "--tensor-parallel-size 1",
        ],
    ),
    "more rows than the parts have": (
        lambda s: s | {f"{LAYER}mlp.gate_up_proj.weight": torch.zeros(256, 64)},
        [rf"{LAYER}mlp.up_proj.weight is in .* \[256, 64\], which is not \[192, 64\]"],
    ),
    "other widths": (
        lambda s: s | {f"{LAYER}mlp.down_proj.weight": torch.zeros(64, 97)},
        [rf"{LAYER}mlp.down_proj.weight is \[64, 97\] in the server, not \[64, 96\]"],
    ),
    "padding where no vocabulary is": (
        lambda s: s | {"model.norm.weight": torch.zeros(128)},
        [r"model.norm.weight is \[128\] in the server, not \[64\]"],
    ),
    "both halves and the whole": (
        lambda s: s | {f"{LAYER}self_attn.q_proj.weight": torch.zeros(64, 64)},
        [rf"64 rows of {LAYER}self_attn.qkv_proj.weight are served and not used"],
    ),
    "tied, and should not be": (
        lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"]},
        ["rows of model.embed_tokens.weight would be two weights at once"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=list(WRONG))
def test_what_cannot_be_mapped_whole_is_refused_with_the_list(change, said):
    with pytest.raises(LiveError) as error:
        map_weights(config_of("qwen3"), change(as_vllm_holds("qwen3")), wanted_of("qwen3"))
    for pattern in said:
        assert re.search(pattern, str(error.value)), str(error.value)


def test_an_untied_server_of_a_tied_model_is_refused():
    served = as_vllm_holds("qwen3_tied")
    served["lm_head.weight"] = served["lm_head.weight"].clone()
    with pytest.raises(LiveError, match=r"lm_head.weight \[448, 64\] is served and not used"):
        map_weights(config_of("qwen3_tied"), served, wanted_of("qwen3_tied"))


def test_a_long_list_is_cut_and_says_so():
    with pytest.raises(LiveError, match=r"\(and \d+ more\)$"):
        map_weights(config_of("qwen3"), {}, wanted_of("qwen3"))


def test_a_family_that_was_not_checked_is_refused_whatever_its_shapes():
    """vLLM keeps GPT-NeoX's query_key_value under the same name, with other rows."""
    config = AutoConfig.for_model("gpt_neox")
    with pytest.raises(LiveError, match="'gpt_neox' models has not been checked; .*qwen3_5_text"):
        map_weights(config, {"a": torch.zeros(2)}, {"a": (2,)})
