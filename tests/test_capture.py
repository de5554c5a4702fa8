"""The residual stream is read at the right tokens and layers, whatever the batch, and once only."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from amygdala_lib import capture, load_model, steer
from amygdala_lib.capture import residual_stream
from amygdala_lib.directions import Directions
from amygdala_lib.errors import ModelError
from amygdala_lib.models import find_layers

LAYERS = [-1, 0, 2, 3]  # not the last: transformers gives that one after the final norm
CLOSE = 2e-5
"""Largest difference allowed, as a share of the largest value: float32 with its sums reordered."""


def read(lm, texts, layers=LAYERS, **options):
    return capture(lm, texts, layers, **{"cache": None, "progress": False, **options})


def reference(lm, texts, dtype=torch.float64):
    """For each text and layer, (content tokens, hidden) from a forward of its own."""
    model = copy.deepcopy(lm.model).to(dtype)
    model.set_experts_implementation("eager")  # the faster one has no float64
    special = set(lm.tokenizer.all_special_ids)
    found = []
    for text in texts:
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
        own = torch.tensor([i not in special for i in ids[0].tolist()])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append({layer: states[layer + 1][0][own] for layer in LAYERS})
    return found


def rounding(lm, texts, expected):
    """How far float32 takes a plain forward of one text from float64, at worst.

    A random Qwen3-Next amplifies it more on one processor than on another.
    """
    plain = reference(lm, texts, torch.float32)
    return max(
        distance(one[layer], other[layer])
        for one, other in zip(plain, expected, strict=True)
        for layer in LAYERS
    )


def distance(a, b, of=None):
    """Largest difference as a share of the largest value in b, or in `of`, which b sums up."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / (b if of is None else of).abs().max()).item()


def n_hooks(lm):
    modules = list(lm.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def counted(monkeypatch, lm):
    """The number of texts that forwards of `lm` are given, in a list that grows."""
    rows, forward = [], lm.model.forward

    def counting(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", counting)
    return rows


def with_chat(lm, template):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(lm, tokenizer=tokenizer)


def copied(lm, dtype=torch.float32):
    """A model of one's own, to be changed."""
    model = copy.deepcopy(lm.model).to(dtype)
    return dataclasses.replace(lm, model=model, layers=find_layers(model))


# The right tokens


def test_each_pool_reads_the_texts_own_tokens_as_a_plain_forward_has_them(any_lm, texts):
    some = texts[:8]
    expected = reference(any_lm, some)
    close = max(CLOSE, 2 * rounding(any_lm, some, expected))
    last, mean, tokens = (read(any_lm, some, pool=pool) for pool in ("last", "mean", "tokens"))
    for layer in LAYERS:
        for row, states in enumerate(expected):
            assert distance(last[layer][row], states[layer][-1]) < close
            assert distance(mean[layer][row], states[layer].mean(0), of=states[layer]) < close
            assert tokens[layer][row].shape == states[layer].shape
            assert distance(tokens[layer][row], states[layer]) < close
        lengths = torch.cat([states[layer].norm(dim=-1) for states in expected])
        for acts in (last, mean, tokens):
            assert acts.residual_norms[layer] == pytest.approx(lengths.mean().item(), rel=close)


@pytest.mark.parametrize(("family", "added"), [("bert", 2), ("llama", 1)])
def test_special_tokens_are_run_but_not_read(loaded, family, added):
    lm, text = loaded(family), "The bus has two doors."
    ids = lm.tokenizer(text)["input_ids"]
    spelt = read(lm, [text], pool="tokens").tokens[0]
    assert "".join(spelt) == text
    assert len(ids) - len(spelt) == added, "the tokenizer of this test adds special tokens"


@pytest.mark.parametrize("skip", [1, 3, 50])
def test_mean_passes_over_the_first_tokens_unless_there_are_no_more(lm, texts, skip):
    tokens, mean = read(lm, texts, pool="tokens"), read(lm, texts, pool="mean", skip=skip)
    lengths = [len(text) for text in tokens[0]]
    assert min(lengths) <= 3 and max(lengths) > 50
    for row, states in enumerate(tokens[2]):
        kept = states[skip:] if len(states) > skip else states
        assert distance(mean[2][row], kept.mean(0), of=kept) < CLOSE


def test_the_last_layer_is_read_before_the_final_norm(causal_lm):
    acts = read(causal_lm, ["The bus has two doors."], [4], pool="tokens")
    ids = causal_lm.tokenizer("The bus has two doors.", return_tensors="pt")["input_ids"]
    states = []
    hook = causal_lm.layers[4].register_forward_hook(lambda *parts: states.append(parts[-1]))
    with torch.no_grad():
        normed = causal_lm.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    hook.remove()
    state = states[0][0] if isinstance(states[0], tuple) else states[0]
    own = state.reshape(ids.shape[1], -1)[-len(acts[4][0]) :]
    assert distance(acts[4][0], own) < CLOSE
    assert distance(acts[4][0], normed[0, -len(own) :]) > 0.01


def test_blocks_that_return_a_tuple_are_read_too(loaded):
    lm, kinds = loaded("bloom"), []
    hook = lm.layers[0].register_forward_hook(lambda *parts: kinds.append(type(parts[-1])))
    acts = read(lm, ["Rain."], [0])
    hook.remove()
    assert kinds == [tuple], "the point of this family"
    assert acts[0].shape == (1, lm.hidden_size)


# The same, however it is batched


def test_a_batch_of_one_and_of_32_give_the_same(any_lm, texts):
    assert len(texts) == 32
    for pool in ("last", "mean"):
        one = read(any_lm, texts, [*LAYERS, 4], pool=pool, batch_tokens=1)
        all_at_once = read(any_lm, texts, [*LAYERS, 4], pool=pool, batch_tokens=10**6)
        for layer in one.layers:
            assert distance(all_at_once[layer], one[layer]) < CLOSE
            norms = one.residual_norms[layer], all_at_once.residual_norms[layer]
            assert norms[0] == pytest.approx(norms[1], rel=CLOSE)


def test_batches_are_what_the_budget_says(lm, texts, monkeypatch):
    rows = counted(monkeypatch, lm)
    read(lm, texts, [0], batch_tokens=1)
    read(lm, texts, [0], batch_tokens=10**6)
    assert rows == [1] * 32 + [32]


@settings(max_examples=10)
@given(batch_tokens=st.integers(1, 4000))
def test_no_budget_changes_what_is_read(loaded, texts, batch_tokens):
    lm = loaded("qwen3")
    few = read(lm, texts[:12], [2], batch_tokens=batch_tokens)
    assert distance(few[2], read(lm, texts[:12], [2])[2]) < CLOSE


def test_tokenizers_that_pad_left_and_right_give_the_same_bits(any_lm, texts):
    read_from = {}
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(any_lm.tokenizer)
        tokenizer.padding_side = side
        read_from[side] = read(dataclasses.replace(any_lm, tokenizer=tokenizer), texts)
    for layer in LAYERS:
        assert torch.equal(read_from["left"][layer], read_from["right"][layer])


def test_a_tokenizer_without_a_padding_token_will_do(lm, texts):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.pad_token = None
    bare = read(dataclasses.replace(lm, tokenizer=tokenizer), texts)
    assert distance(bare[2], read(lm, texts)[2]) < CLOSE


@settings(max_examples=25)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6))
def test_any_text_is_read_in_full_and_each_distinct_one_once(loaded, texts):
    lm = loaded("qwen3")
    acts = read(lm, [*texts, *texts], [0], pool="tokens")
    assert acts.texts == list(dict.fromkeys(texts))
    for text, states in zip(acts.texts, acts[0], strict=True):
        assert len(states) == len(lm.tokenizer(text)["input_ids"])


def test_a_corpus_is_read_in_the_order_of_its_texts(lm, corpus):
    acts = read(lm, corpus)
    assert acts.texts == corpus.texts
    assert torch.equal(acts[2], read(lm, corpus.texts)[2])


def test_activations_are_float32_on_the_cpu_and_can_be_trained_on(lm, texts):
    narrow = copied(lm, torch.bfloat16)
    for pool in ("last", "tokens"):
        value = read(narrow, texts[:3], [2], pool=pool)[2][0]
        assert (value.dtype, value.device.type) == (torch.float32, "cpu")
        weight = torch.ones(64, requires_grad=True)
        (value @ weight).sum().backward()
        assert weight.grad.shape == (64,)


def test_a_layer_that_was_not_captured_is_named(lm):
    with pytest.raises(ModelError, match=r"layer 3 was not captured \(layers: \[0, 2\]\)"):
        read(lm, ["Rain."], [2, 0])[3]


# Nothing more than needed, and nothing left behind


def test_later_layers_are_not_run(any_lm, monkeypatch):
    runs = []
    for i, block in enumerate(any_lm.layers):
        forward = block.forward

        def counting(*args, _i=i, _forward=forward, **kwargs):
            runs.append(_i)
            return _forward(*args, **kwargs)

        monkeypatch.setattr(block, "forward", counting)
    read(any_lm, ["Rain."], [-1, 2])
    assert runs == [0, 1, 2]


def test_no_hook_is_left_behind(any_lm, texts):
    before = n_hooks(any_lm)
    read(any_lm, texts[:3], [-1, 0, 4])
    assert n_hooks(any_lm) == before


def test_no_hook_is_left_behind_by_a_forward_that_fails(lm):
    before = n_hooks(lm)
    with pytest.raises(IndexError):
        read(unreadable(lm), ["Rain.", "zzz"])
    assert n_hooks(lm) == before


def test_the_model_writes_the_same_after_it_was_read(causal_lm, texts):
    ids = causal_lm.tokenizer(texts[5], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = causal_lm.model(input_ids=ids).logits
        read(causal_lm, texts[:3], [1])
        assert torch.equal(causal_lm.model(input_ids=ids).logits, before)


def test_residual_stream_follows_every_forward_until_it_is_left(lm):
    ids = lm.tokenizer("The bus has two doors.", return_tensors="pt")["input_ids"]
    with torch.no_grad(), residual_stream(lm, [-1, 2]) as stream:
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
        assert torch.equal(stream[-1], states[0])
        assert torch.equal(stream[2], states[3])
        stream.clear()
        lm.model(input_ids=ids[:, :3])
        assert stream[2].shape == (1, 3, 64)
        stream.clear()
    lm.model(input_ids=ids)
    assert stream == {}


# The cache


def unreadable(lm):
    """The same model, whose tokenizer gives "zzz" an id that the model has no embedding for."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_tokens(["zzz"])
    return dataclasses.replace(lm, tokenizer=tokenizer)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("pool", ["last", "mean", "tokens"])
def test_a_second_run_reads_everything_from_the_cache(
    lm, texts, tmp_path, pool, monkeypatch, capsys
):
    first = read(lm, texts, pool=pool, cache=tmp_path)
    assert first.reused == 0
    rows = counted(monkeypatch, lm)
    second = read(lm, texts[::-1], pool=pool, cache=tmp_path, progress=True)
    assert rows == []
    assert second.reused == len(texts)
    assert f"reused activations of 32 texts from {tmp_path}" in capsys.readouterr().err
    for layer in LAYERS:
        assert second.residual_norms[layer] == pytest.approx(first.residual_norms[layer], rel=1e-12)
        for a, b in zip(first[layer], reversed(list(second[layer])), strict=True):
            assert torch.equal(a, b)


def test_a_changed_text_is_the_only_one_run_again(lm, texts, tmp_path, monkeypatch):
    before = read(lm, texts, cache=tmp_path)
    rows = counted(monkeypatch, lm)
    changed = [*texts[:4], texts[4] + "!", *texts[5:]]
    acts = read(lm, changed, cache=tmp_path)
    assert (rows, acts.reused) == ([1], 31)
    assert acts.texts == changed
    assert torch.equal(acts[2][[3, 5]], before[2][[3, 5]])
    assert distance(acts[2], read(lm, changed)[2]) < CLOSE
    assert read(lm, changed, cache=tmp_path).reused == 32, "found in two files"


def test_one_changed_weight_runs_everything_again(lm, texts, tmp_path):
    lm = copied(lm)
    before = read(lm, texts, cache=tmp_path)
    lm.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    after = read(lm, texts, cache=tmp_path)
    assert after.reused == 0
    assert after.model_hash != before.model_hash
    assert not torch.equal(after[2], before[2])


def test_a_model_loaded_again_finds_its_activations(any_lm, model_folder, texts, tmp_path):
    read(any_lm, texts[:3], cache=tmp_path)
    torch.rand(1)  # what a checkpoint lacks is drawn at random, but not from here
    again = load_model(model_folder(any_lm.name), device="cpu")
    assert read(again, texts[:3], cache=tmp_path).reused == 3


def test_layers_pools_skips_and_dtypes_are_kept_apart(lm, texts, tmp_path):
    some = texts[:6]
    narrow = copied(lm, torch.bfloat16)
    for model, options in [
        (lm, {"layers": [1]}),
        (lm, {"layers": [2]}),
        (lm, {"layers": [2], "pool": "mean"}),
        (lm, {"layers": [2], "pool": "mean", "skip": 2}),
        (lm, {"layers": [2], "pool": "tokens"}),
        (narrow, {"layers": [2]}),
    ]:
        fresh, kept = read(model, some, **options), read(model, some, **options, cache=tmp_path)
        again = read(model, some, **options, cache=tmp_path)
        assert (kept.reused, again.reused) == (0, 6)
        for a, b in zip(fresh[fresh.layers[0]], again[fresh.layers[0]], strict=True):
            assert torch.equal(a, b)


def test_layers_that_were_read_together_are_found_singly(lm, texts, tmp_path):
    both = read(lm, texts, [1, 2], cache=tmp_path)
    one = read(lm, texts, [2], cache=tmp_path)
    assert one.reused == 32
    assert one.layers == [2]
    assert torch.equal(one[2], both[2])
    assert read(lm, texts, [2, 3], cache=tmp_path).reused == 0


def test_texts_in_a_chat_template_are_kept_apart_from_bare_ones(lm, tmp_path):
    chat = with_chat(lm, "User: {{ messages[0]['content'] }}")
    assert read(chat, ["Rain."], cache=tmp_path).reused == 0
    assert read(chat, ["Rain."], chat_template=True, cache=tmp_path).reused == 0


@pytest.mark.parametrize("damage", ["cut short", "empty", "no index"])
def test_a_damaged_cache_file_is_told_of_and_replaced(lm, texts, tmp_path, damage):
    before = read(lm, texts, cache=tmp_path)
    (file,) = files(tmp_path)
    content = file.read_bytes()
    if damage == "no index":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        shorter = json.dumps(header).encode().ljust(length)
        file.write_bytes(content[:8] + shorter + content[8 + length :])
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")
    with pytest.warns(UserWarning, match="is damaged.*run again"):
        again = read(lm, texts, cache=tmp_path)
    assert again.reused == 0
    assert torch.equal(again[2], before[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(lm, texts, cache=tmp_path).reused == 32


def test_a_run_that_fails_midway_leaves_no_file(lm, texts, tmp_path, monkeypatch):
    broken = unreadable(lm)
    rows = counted(monkeypatch, lm)
    with pytest.raises(IndexError):
        read(broken, [*texts, "zzz"], cache=tmp_path, batch_tokens=1)
    assert len(rows) > 10, "it failed after some texts were read"
    assert files(tmp_path) == []


def test_without_a_cache_nothing_is_written(lm, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("AMYGDALA_CACHE", str(tmp_path))
    read(lm, texts[:2], cache=None)
    assert files(tmp_path) == []
    capture(lm, texts[:2], [0], progress=False)
    assert len(files(tmp_path)) == 1, "the default cache is where the environment says"


def test_a_steered_model_is_read_as_steered_and_never_cached(lm, texts, tmp_path):
    directions = Directions(
        ["calm"], {0: torch.eye(64)[:1]}, {0: 1.0}, {0: torch.zeros(1)}, {0: torch.ones(1)}
    )
    plain = read(lm, texts[:4], cache=tmp_path)
    kept = files(tmp_path)
    with steer(lm, directions, {"calm": 3.0}):
        steered = read(lm, texts[:4], cache=tmp_path)
        read(lm, ["Only steered."], cache=tmp_path)
    assert distance(steered[0] - plain[0], 3 * torch.eye(64)[:1].expand(4, -1)) < CLOSE
    assert not torch.equal(steered[2], plain[2])
    assert files(tmp_path) == kept


# Chat templates

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "text", ["The kettle took its time.", "user", "s", "  im_end, he wrote. ", "Gelöst — 静か"]
)
def test_a_chat_template_is_run_but_only_the_text_is_read(lm, text):
    chat = with_chat(lm, TEMPLATE)
    acts = read(chat, [text], [2], pool="tokens", chat_template=True)
    before, after = "<|im_start|>user\n", "<|im_end|>\n"
    parts = [lm.tokenizer(part)["input_ids"] for part in (before, text.strip(), after)]
    assert lm.tokenizer(before + text.strip() + after)["input_ids"] == sum(parts, [])
    with torch.no_grad(), residual_stream(lm, [2]) as stream:
        lm.model(input_ids=torch.tensor([sum(parts, [])]))
    own = stream[2][0, len(parts[0]) : len(parts[0]) + len(parts[1])]
    assert acts[2][0].shape == own.shape
    assert distance(acts[2][0], own) < CLOSE


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template: leave chat_template off"),
        ("{{ messages[0]['content'] | upper }}", "rewrites 'Rain.', 'Snow.'"),
        ("Hello.", "rewrites 'Rain.', 'Snow.'"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(lm, template, message):
    with pytest.raises(ModelError, match=message):
        read(with_chat(lm, template), ["Rain.", "Snow."], chat_template=True)


# What cannot be read


def test_all_wrong_arguments_are_named_at_once_before_anything_runs(lm, monkeypatch):
    rows = counted(monkeypatch, lm)
    with pytest.raises(ModelError) as refused:
        read(lm, ["Rain.", None, 3], [-2, 1, 5], pool="first", skip=-1)
    for part in ("texts [1, 2] are not", "no pool 'first'", "last, mean, tokens", "[-2, 5]", "-1"):
        assert part in str(refused.value)
    assert rows == []


def test_all_texts_that_cannot_be_read_are_named_at_once_before_anything_runs(lm, monkeypatch):
    rows = counted(monkeypatch, lm)
    long = "The bus has two doors. " * 60
    with pytest.raises(ModelError) as refused:
        read(lm, ["Rain.", "", long, SENTENCES["calm"][0]])
    problems = str(refused.value).splitlines()
    assert problems[0] == "text 1 ('') has no tokens: remove it"
    assert "text 2 ('The bus has two doors. The bus has two d...') has" in problems[1]
    assert "qwen3_5 reads 256: split it" in problems[1]
    assert len(problems) == 2
    assert rows == []


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_text_of_special_tokens_alone_is_refused(loaded, family):
    with pytest.raises(ModelError, match="has no tokens"):
        read(loaded(family), [""])


@pytest.mark.parametrize(
    ("texts", "message"),
    [("Rain.", r"the one string 'Rain.'.*\[text\]"), ([], "no texts to capture")],
)
def test_a_lone_string_and_no_texts_are_refused(lm, texts, message):
    with pytest.raises(ModelError, match=message):
        read(lm, texts)


def test_a_text_that_just_fits_is_read(loaded):
    lm = loaded("gpt2")
    word = lm.tokenizer.decode([40])
    assert len(lm.tokenizer(word * 256)["input_ids"]) == 256
    read(lm, [word * 256], [0])
    with pytest.raises(ModelError, match="257 tokens"):
        read(lm, [word * 257], [0])


def test_a_dtype_that_overflows_is_refused_and_not_cached(lm, tmp_path):
    narrow = copied(lm, torch.float16)
    narrow.layers[1].mlp.down_proj.weight.fill_(6e4)
    assert math.isfinite(read(narrow, ["Rain."], [0]).residual_norms[0])
    with pytest.raises(ModelError, match=r"not finite at layers \[1, 2\].*torch.bfloat16"):
        read(narrow, ["Rain."], [0, 1, 2], cache=tmp_path)
    assert files(tmp_path) == []
