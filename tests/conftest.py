"""Tiny random models of every family, written to disk once per session, and a tiny corpus."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches for the hub

import pytest
import torch
import transformers as hf
import yaml
from hypothesis import settings
from tokenizers.processors import TemplateProcessing

from amygdala_lib.corpus import load_corpus
from amygdala_lib.demo.train import train_tokenizer
from amygdala_lib.models import load_model

# The same examples every time, and no limit on how long one takes: machines are slow now and then.
settings.register_profile("everywhere", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("everywhere")

SENTENCES = {
    "calm": [
        "The kettle took its time, and so did he.",
        "She let the phone ring out and went on folding sheets.",
        "I feel calm. My hands lie where I left them.",
        "Rain on the roof; there was nowhere else to be, and nobody had to be told.",
    ],
    "afraid": [
        "She counted the stairs again!",
        "The latch, and then nothing, and then the latch once more.",
        "I feel afraid. Something is on the other side of the door, and it is patient.",
        "He held his breath until the footsteps had gone past.",
    ],
    "proud": [
        "He read his own name on the brass plate twice.",
        "I feel proud. The roof is tight and I made it.",
        "She stood a little back from the loaf, so that all of it could be seen.",
    ],
}
CONCEPTLESS = ["The shop opens at nine.", "The bus has two doors, and a step that folds."]
NEUTRAL = ["Basalt is dark.", "Granite is pale, and cools slowly."]

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    # Five times the usual, or every layer would be a whisper beside the embedding.
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
DELTA_NET = GROUPED | {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_5": (hf.Qwen3_5ForCausalLM, hf.Qwen3_5TextConfig, SIZES | DELTA_NET),
    "qwen3_next": (hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, SIZES | DELTA_NET | EXPERTS),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, SIZES | GROUPED),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SIZES | GROUPED),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, SIZES),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SIZES),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, SIZES),  # its blocks return tuples
    "bert": (hf.BertForMaskedLM, hf.BertConfig, SIZES),  # reads, and does not write
}
CAUSAL = [family for family in FAMILIES if family != "bert"]


def new_tokenizer(family: str) -> hf.PreTrainedTokenizerFast:
    """The demo's kind of tokenizer; with [CLS] and [SEP] for BERT, and a BOS for Llama."""
    tokenizer = train_tokenizer([*sum(SENTENCES.values(), []), *CONCEPTLESS], vocab_size=400)
    added = {
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"},
        "llama": {"bos_token": "<s>"},
    }.get(family, {})
    if added:
        tokenizer.add_special_tokens(added)
        numbers = [(token, tokenizer.convert_tokens_to_ids(token)) for token in added.values()]
        around = "[CLS] $A [SEP]" if family == "bert" else "<s> $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=around, special_tokens=numbers
        )
    return tokenizer


@pytest.fixture(autouse=True, scope="session")
def own_activation_cache(tmp_path_factory):
    """Tests neither use nor fill the cache in runs/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMYGDALA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The folder a random model of a family was saved in: `model_folder("llama")`."""

    @cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / family
        tokenizer = new_tokenizer(family)
        model_class, config_class, sizes = FAMILIES[family]
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        torch.manual_seed(1)
        model_class(config_class(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def loaded(model_folder):
    """A family's model as the library loads it, shared: leave it as it was."""
    return cache(lambda family: load_model(model_folder(family), device="cpu"))


@pytest.fixture(params=FAMILIES)
def any_lm(request, loaded):
    """Every family in turn."""
    return loaded(request.param)


@pytest.fixture(params=CAUSAL)
def causal_lm(request, loaded):
    """Every family that writes, in turn."""
    return loaded(request.param)


@pytest.fixture
def lm(loaded):
    """A Qwen3.5 hybrid: three GatedDeltaNet layers, one of attention, one GatedDeltaNet."""
    return loaded("qwen3_5")


@pytest.fixture(scope="session")
def texts():
    """32 texts, from one word to some seventy."""
    pieces = [*sum(SENTENCES.values(), []), *CONCEPTLESS, *NEUTRAL]
    longer = (" ".join([*pieces[i % 7 : i % 7 + 1 + i % 6], f"{i}"]) for i in range(31))
    return ["Rain.", *longer]


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Three concepts, two conceptless texts, two neutral ones."""
    root = tmp_path_factory.mktemp("corpus")
    fields = {"gloss": "a line", "cluster": "all", "sources": ["by hand"], "near": []}
    concepts = {name: fields | {"valence": 0.1, "arousal": 0.1} for name in SENTENCES}
    manifest = {"version": 1, "clusters": {"all": "every one"}, "concepts": concepts}
    files = {f"stories/{name}.txt": found for name, found in SENTENCES.items()}
    files |= {"direct/_baseline.txt": CONCEPTLESS, "neutral/geology.txt": NEUTRAL}
    for path, found in files.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("\n\n".join(found), encoding="utf-8")
    (root / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def corpus(corpus_folder):
    return load_corpus(corpus_folder)


@pytest.fixture
def quiet_figures():
    """A warning is an error, and no figure stays open."""
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of another test's garbage
        yield
    plt.close("all")
