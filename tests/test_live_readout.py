"""A live readout gives every token the projections a full forward would give it, and no others."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from amygdala_lib import AmygdalaError, Directions, Readout, capture, load_model, steer
from amygdala_lib.artefacts import repository_root
from amygdala_lib.errors import ModelError
from amygdala_lib.readout import Sampling
from amygdala_lib.readout.spelling import spell

LAYERS = [-1, 1, 3]
CONCEPTS = ["calm", "afraid", "proud", "sad"]
PROMPT = "The kettle took its time, and"
PROMPTS = [
    "Rain.",
    PROMPT,
    "She let the phone",
    "Something is on the other side of the door, and it is patient.",
    "I feel calm. My hands lie where I left them.",
    "He",
    "The bus has two doors, and a step that folds. Basalt is dark.",
    "She counted the stairs again!",
]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def readout_of(lm, layers=LAYERS):
    """Random unit vectors, means and deviations: nothing here depends on what they stand for."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(CONCEPTS), lm.hidden_size)
    return Readout(
        Directions(
            concepts=CONCEPTS,
            vectors={n: normalize(torch.randn(shape, generator=generator)) for n in layers},
            residual_norms=dict.fromkeys(layers, 10.0),
            means={n: torch.randn(len(CONCEPTS), generator=generator) for n in layers},
            stds={n: 1 + torch.rand(len(CONCEPTS), generator=generator) for n in layers},
            provenance={"model": lm.name, "revision": lm.revision},
        )
    )


def batch_of(lm, texts, side="left"):
    found = lm.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def places_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def by_hand(lm, readout, ids, mask):
    """(rows, places, layers, concepts) in float64: a full forward, read by transformers itself."""
    out = lm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=places_of(mask),
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.stack(
        [
            out.hidden_states[n + 1].double() @ readout.directions.vectors[n].double().T
            for n in readout.directions.layers
        ],
        dim=2,
    )


def recorded(live, sequence, *, generated=None):
    """(tokens, layers, concepts), of one sequence of the frame, and its positions."""
    frame = live.frame()
    frame = frame[frame.sequence == sequence]
    if generated is not None:
        frame = frame[frame.generated == generated]
    shape = (-1, len(live.layers), len(live.concepts))
    values = torch.tensor(frame["value"].to_numpy()).reshape(shape)
    positions = frame["position"].to_numpy().reshape(shape)[:, 0, 0].tolist()
    return values, positions


def close(found, expected):
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max()
    assert (found - expected).nan_to_num().abs().max() < 1e-4 * scale


def last_unread(expected, length):
    """As they are to be recorded: the last generated token was never read."""
    expected = expected[:length].clone()
    expected[-1] = torch.nan
    return expected


def check_generated(lm, readout, live, sequences, mask, *, first=0, lengths=None, prompt=True):
    """Every sequence of the live readout against a full forward over what was returned."""
    grown = mask.new_ones(len(sequences), sequences.shape[1])
    grown[:, : mask.shape[1]] = mask.repeat_interleave(len(sequences) // len(mask), dim=0)
    whole = by_hand(lm, readout, sequences, grown)
    start = mask.shape[1]
    for s in range(len(sequences)):
        length = sequences.shape[1] - start if lengths is None else lengths[s]
        values, positions = recorded(live, first + s, generated=True)
        close(values, last_unread(whole[s, start:], length))
        real = int(grown[s, :start].sum())
        assert positions == list(range(real, real + length))
        if prompt:
            values, positions = recorded(live, first + s, generated=False)
            close(values, whole[s, :start][grown[s, :start].bool()])
            assert positions == list(range(real))
        else:
            assert not len(recorded(live, first + s, generated=False)[0])


def state_of(lm):
    """All that a live readout sets on a model."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()]
    return sum(hooks), "generate" in vars(lm.model)


@pytest.fixture(autouse=True)
def left_as_it_was(loaded):
    yield
    for family in ("qwen3_5", "qwen3"):
        assert state_of(loaded(family))[1] is False


# What it records


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_prompt_and_generated_tokens_have_the_values_of_a_full_forward(loaded, family, n):
    lm = loaded(family)
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:n])
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch, **GREEDY)
    assert len(out) == n and out.shape[1] == batch["input_ids"].shape[1] + 8
    check_generated(lm, readout, live, out, batch["attention_mask"])


def test_every_family_can_be_read(causal_lm):
    readout, batch = readout_of(causal_lm), batch_of(causal_lm, PROMPTS[:2])
    with readout.attach(causal_lm, prompt=True) as live:
        out = causal_lm.model.generate(**batch, **GREEDY | {"max_new_tokens": 3})
    check_generated(causal_lm, readout, live, out, batch["attention_mask"])


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_padding_at_the_right_of_a_prompt_is_passed_over(loaded, family):
    """Against the states `generate` itself returns: in a full forward, a hybrid has others then."""
    lm = loaded(family)
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS, "right")
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(
            **batch, **GREEDY, output_hidden_states=True, return_dict_in_generate=True
        )
    real = batch["attention_mask"].bool()
    for s in range(len(PROMPTS)):
        steps = [torch.stack([step[n + 1][s] for n in LAYERS], 1) for step in out.hidden_states]
        states = torch.cat([steps[0][real[s]], *steps[1:]]).double()
        vectors = torch.stack([readout.directions.vectors[n] for n in LAYERS]).double()
        expected = torch.einsum("tlh,lch->tlc", states, vectors)
        values, positions = recorded(live, s)
        close(values[:-1], expected)
        assert values[-1].isnan().all()
        assert positions == list(range(int(real[s].sum()) + 8))


@pytest.mark.parametrize("n", [1, 8])
def test_the_prompt_is_left_out_unless_asked_for(lm, n):
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:n])
    with readout.attach(lm) as live:
        out = lm.model.generate(**batch, **GREEDY)
    check_generated(lm, readout, live, out, batch["attention_mask"], prompt=False)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_over_texts_is_recorded_without_its_padding(loaded, family, side):
    lm = loaded(family)
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS, side)
    if family == "bert":
        batch = batch_of(lm, PROMPTS, "right")
    with readout.attach(lm) as live, torch.no_grad():
        lm.model(batch["input_ids"], batch["attention_mask"])
        lm.model(**batch_of(lm, PROMPT))
    for s, text in enumerate([*PROMPTS, PROMPT]):
        alone = batch_of(lm, text)
        values, positions = recorded(live, s)
        if side == "right" or family == "bert" or s == len(PROMPTS):
            close(values, by_hand(lm, readout, **renamed(alone))[0])
        assert len(values) == alone["input_ids"].shape[1]
        assert positions == list(range(len(values)))
    assert not live.frame().generated.any()


def renamed(batch):
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"]}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_values_of_beams_are_those_of_the_beams_that_were_kept(loaded, family, do_sample):
    lm = loaded(family)
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:3])
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 3, "do_sample": do_sample}
    with torch.random.fork_rng(), readout.attach(lm, prompt=True) as live:
        torch.manual_seed(3)
        out = lm.model.generate(**batch, **options, return_dict_in_generate=True)
    rows = out.beam_indices
    assert any(len(set(row.tolist())) > 1 for row in rows), "no beam ever changed its row"
    assert len(rows) == 9
    check_generated(lm, readout, live, out.sequences, batch["attention_mask"])


def test_beams_that_end_early_are_followed_to_their_end(loaded):
    lm = loaded("qwen3")
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:3])
    options = {"do_sample": False, "max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 4}
    plain = lm.model.generate(**batch, **options | {"eos_token_id": None})
    end = plain[0, batch["input_ids"].shape[1] + 3].item()
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(
            **batch, **options, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
        )
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    assert len(set(lengths)) > 1
    mask = batch["attention_mask"]
    check_generated(lm, readout, live, out.sequences, mask, lengths=lengths)


def test_beams_without_a_cache_are_followed_too(lm):
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:2])
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch, **GREEDY, num_beams=3, use_cache=False)
    check_generated(lm, readout, live, out, batch["attention_mask"])


@pytest.mark.parametrize("pad", [0, 7])
def test_a_row_that_ends_before_the_others_ends_in_the_readout(loaded, pad):
    lm = loaded("qwen3")
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": pad}
    start = batch["input_ids"].shape[1]
    plain = lm.model.generate(**batch, **options | {"eos_token_id": None})
    end = plain[0, start + 3].item()
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch, **options, eos_token_id=[end, 399])
    made = [row.tolist() for row in out[:, start:]]
    lengths = [row.index(end) + 1 if end in row else len(row) for row in made]
    assert min(lengths) <= 4 < max(lengths), "rows end at different lengths"
    check_generated(lm, readout, live, out, batch["attention_mask"], lengths=lengths)
    frame = live.frame()
    for s, length in enumerate(lengths):
        told = frame[(frame.sequence == s) & frame.generated & (frame.layer == 1)]
        told = told[told.concept == "calm"]
        assert "".join(told.token) == lm.tokenizer.decode(made[s][:length])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_of_generating_do_not_matter(loaded, options):
    lm = loaded("qwen3")
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:3])
    with torch.random.fork_rng(), readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch, **GREEDY | options)
    check_generated(lm, readout, live, out, batch["attention_mask"])


def test_tokens_that_speculation_took_back_leave_no_trace(loaded):
    lm = loaded("qwen3")
    text = "Rain on the roof; rain on the sill; rain on the roof; rain on the"
    readout, batch = readout_of(lm), batch_of(lm, text)
    read = []
    counting = lm.model.register_forward_hook(
        lambda module, inputs, keywords, output: read.append(keywords["input_ids"].shape[1]),
        with_kwargs=True,
    )
    options = GREEDY | {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4}
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch, **options)
    counting.remove()
    assert sum(read) > out.shape[1] - 1, "some tokens were read and taken back"
    check_generated(lm, readout, live, out, batch["attention_mask"])


def test_settings_may_come_in_a_generation_config(lm):
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:2])
    config = GenerationConfig(max_new_tokens=6, num_beams=3, do_sample=False)
    before = config.to_dict()
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
    assert isinstance(out, torch.Tensor), "in the form that was asked for"
    assert config.to_dict() == before
    plain = lm.model.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
    assert torch.equal(out, plain)
    generated = live.frame().query("generated").groupby("sequence").position.nunique()
    assert generated.max() <= 6 and len(generated) == 2


def test_what_is_generated_is_the_same_to_the_bit_with_and_without(causal_lm):
    batch = batch_of(causal_lm, PROMPTS[:3])
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    plain = causal_lm.model.generate(**batch, **options)
    with readout_of(causal_lm).attach(causal_lm, prompt=True):
        read = causal_lm.model.generate(**batch, **options)
    assert torch.equal(plain.sequences, read.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, read.logits, strict=True))


def test_calls_after_one_another_are_sequences_after_one_another(lm):
    readout = readout_of(lm)
    batches = [batch_of(lm, texts) for texts in (PROMPTS[:2], PROMPTS[2:3], PROMPTS[3:6])]
    with readout.attach(lm, prompt=True) as live:
        outs = [lm.model.generate(**batch, **GREEDY) for batch in batches]
    for out, batch, first in zip(outs, batches, [0, 2, 3], strict=True):
        check_generated(lm, readout, live, out, batch["attention_mask"], first=first)
    assert live.frame().sequence.nunique() == 6


def test_a_conversation_goes_on_from_the_cache_of_its_beginning(loaded):
    lm = loaded("qwen3")
    readout, begun = readout_of(lm), batch_of(lm, PROMPT)
    with readout.attach(lm, prompt=True) as live:
        out = lm.model.generate(**begun, **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([out.sequences, batch_of(lm, " Rain.")["input_ids"]], dim=1)
        again = lm.model.generate(
            longer,
            attention_mask=torch.ones_like(longer),
            past_key_values=out.past_key_values,
            **GREEDY,
        )
    whole = by_hand(lm, readout, again, torch.ones_like(again))[0]
    values, positions = recorded(live, 1)
    start = out.sequences.shape[1] - 1
    assert positions == list(range(start, again.shape[1])), "what the cache held is not read again"
    close(values, last_unread(whole[start:], again.shape[1] - start))


def test_forwards_that_share_a_cache_are_one_sequence(loaded):
    lm = loaded("qwen3_5")
    readout, ids = readout_of(lm), batch_of(lm, PROMPTS[3])["input_ids"]
    with readout.attach(lm) as live, torch.no_grad():
        cache = lm.model(ids[:, :5]).past_key_values
        for token in ids[0, 5:]:
            cache = lm.model(token[None, None], past_key_values=cache).past_key_values
        lm.model(ids, past_key_values=DynamicCache(config=lm.model.config))
    whole = by_hand(lm, readout, ids, torch.ones_like(ids))[0]
    for sequence in range(2):
        values, positions = recorded(live, sequence)
        close(values, whole)
        assert positions == list(range(ids.shape[1]))
    assert live.frame().sequence.nunique() == 2


@pytest.mark.parametrize("steered_first", [True, False])
def test_steering_shows_whichever_block_is_the_outer_one(lm, steered_first):
    readout, ids = readout_of(lm), batch_of(lm, PROMPT)["input_ids"]
    mask = torch.ones_like(ids)
    plain = by_hand(lm, readout, ids, mask)[0]
    push = 0.5 * 10 * readout.directions.vectors[3][0].double()

    def steered():
        return steer(lm, readout.directions, {"calm": 0.5}, layers=[3])

    if steered_first:
        with steered(), readout.attach(lm) as live, torch.no_grad():
            lm.model(ids)
    else:
        with readout.attach(lm) as live, steered(), torch.no_grad():
            lm.model(ids)
    values, _ = recorded(live, 0)
    plain[:, LAYERS.index(3)] += push @ readout.directions.vectors[3].double().T
    close(values, plain)


def test_reading_does_not_stand_in_the_way_of_gradients(lm):
    embedded = lm.model.get_input_embeddings().weight
    embedded.requires_grad_()
    try:
        with readout_of(lm).attach(lm) as live:
            lm.model(**batch_of(lm, PROMPT)).logits.sum().backward()
        assert embedded.grad.abs().sum() > 0
        assert len(live.frame())
    finally:
        embedded.requires_grad_(False)
        embedded.grad = None


def test_projections_are_in_float32_whatever_the_model_computes_in(model_folder):
    narrow = load_model(model_folder("qwen3_5"), device="cpu", dtype=torch.bfloat16)
    readout, batch = readout_of(narrow), batch_of(narrow, PROMPT)
    with readout.attach(narrow) as live, torch.no_grad():
        narrow.model(**batch)
    values, _ = recorded(live, 0)
    expected = by_hand(narrow, readout, *batch.values())[0]
    assert (values - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_capture_reads_meanwhile_is_not_recorded(lm):
    with readout_of(lm).attach(lm) as live:
        capture(lm, PROMPTS, [1], progress=False)
        assert live.frame().empty
        with torch.no_grad():
            lm.model(**batch_of(lm, PROMPT))
    assert live.frame().sequence.unique().tolist() == [0]


# What it tells


def test_z_scores_are_in_standard_deviations(lm):
    readout, batch = readout_of(lm), batch_of(lm, PROMPT)
    with readout.attach(lm, layers=[1, 3], concepts=["sad", "calm"]) as live:
        lm.model.generate(**batch, **GREEDY)
    frame = live.frame().dropna()
    assert set(frame.concept) == {"sad", "calm"} and set(frame.layer) == {1, 3}
    dirs = readout.directions
    for row in frame.sample(20, random_state=0).itertuples():
        i = dirs.index(row.concept)
        expected = (row.value - dirs.means[row.layer][i]) / dirs.stds[row.layer][i]
        assert row.z == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    wide = live.zscores(3)
    tall = live.frame().query("layer == 3").pivot(index="position", columns="concept", values="z")
    assert list(wide.columns) == ["sad", "calm"]
    assert torch.equal(
        torch.tensor(wide.to_numpy()).nan_to_num(), torch.tensor(tall.to_numpy()).nan_to_num()
    )


@pytest.mark.parametrize("family", ["qwen3_5", "llama", "gpt2"])
def test_the_tokens_spell_the_text(loaded, family):
    lm = loaded(family)
    with readout_of(lm).attach(lm, prompt=True) as live:
        out = lm.model.generate(**batch_of(lm, PROMPT), **GREEDY)
    assert "".join(live.zscores(1).index) == lm.tokenizer.decode(out[0])
    assert len(live.zscores(1)) == out.shape[1]


@given(st.text(max_size=30))
def test_spelling_loses_no_character(loaded, text):
    tokenizer = loaded("qwen3_5").tokenizer
    ids = tokenizer(text)["input_ids"]
    pieces = spell(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_it_says_what_it_is_attached_to(lm):
    with readout_of(lm).attach(lm, layers=[1, 3]) as live:
        assert repr(live).startswith(f"<LiveReadout attached to {lm.name} at layers 1, 3: 4 conc")
        lm.model.generate(**batch_of(lm, PROMPTS[:3]), **GREEDY)
    assert "was attached" in repr(live) and "3 sequences" in repr(live)


def test_asking_before_anything_was_read(lm):
    with readout_of(lm).attach(lm) as live:
        assert live.frame().empty
        assert list(live.frame().columns)[:4] == ["sequence", "position", "token", "generated"]
        with pytest.raises(ModelError, match="no layer 2 .*\n.*no sequence 0 .*there are 0"):
            live.zscores(2)


# As it comes


@pytest.mark.parametrize("prompt", [True, False])
def test_tokens_are_handed_on_as_they_are_read(loaded, prompt):
    lm = loaded("qwen3")
    batch, handed = batch_of(lm, PROMPTS[:3]), []
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    plain = lm.model.generate(**batch, **options | {"eos_token_id": None})
    end = plain[0, batch["input_ids"].shape[1] + 3].item()
    at_step = []

    class Counting(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            at_step.append(len(handed))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with readout_of(lm).attach(lm, prompt=prompt, on_token=handed.append) as live:
        lm.model(**batch_of(lm, "Rain."))
        before = len(handed)
        lm.model.generate(**batch, **options, eos_token_id=end, stopping_criteria=[Counting()])
    if not prompt:
        assert at_step[:2] == [before, before + 3], "one for each row, a token later"
        assert at_step[-1] < len(handed)
    frame = live.frame()
    told = frame[(frame.layer == 1) & (frame.concept == "sad")]
    told = {(row.sequence, row.position): row for row in told.itertuples()}
    assert len(told) == len(handed)
    for reading in handed:
        row = told[reading.sequence, reading.position]
        assert (row.token, row.generated) == (reading.token, reading.generated)
        assert reading.values.shape == (len(LAYERS), len(CONCEPTS))
        for found, expected in [(reading.values, row.value), (reading.zscores, row.z)]:
            assert found[1, 3].item() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    per_row = [[r.position for r in handed if r.sequence == s] for s in range(4)]
    assert all(positions == sorted(positions) for positions in per_row)


def test_an_error_of_the_callback_ends_the_generation_and_keeps_what_was_read(lm):
    state = state_of(lm)
    batch = batch_of(lm, PROMPTS[:2])

    def stop(reading):
        if reading.position == 20:
            raise KeyboardInterrupt

    readout = readout_of(lm)
    with pytest.raises(KeyboardInterrupt), readout.attach(lm, on_token=stop) as live:
        lm.model.generate(**batch, **GREEDY | {"max_new_tokens": 40})
    assert state_of(lm) == state
    frame = live.frame()
    assert frame.sequence.nunique() == 2 and frame.value.notna().all()
    assert frame.generated.all() and frame.position.max() == 20


def test_beams_that_were_interrupted_leave_nothing(lm):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > 20:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with readout_of(lm).attach(lm) as live:
        with pytest.raises(KeyboardInterrupt):
            lm.model.generate(
                **batch_of(lm, PROMPT),
                **GREEDY | {"max_new_tokens": 40},
                num_beams=3,
                stopping_criteria=[Interrupt()],
            )
        assert live.frame().empty
        lm.model.generate(**batch_of(lm, PROMPT), **GREEDY)
    assert live.frame().sequence.unique().tolist() == [0]


# What it leaves


@pytest.mark.parametrize("interruption", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_as_before_when_the_block_is_left(causal_lm, interruption):
    state, ids = state_of(causal_lm), batch_of(causal_lm, PROMPT)["input_ids"]
    with torch.no_grad():
        before = causal_lm.model(ids).logits
    readout = readout_of(causal_lm)
    try:
        with readout.attach(causal_lm), readout.attach(causal_lm, prompt=True) as inner:
            assert state_of(causal_lm) != state
            causal_lm.model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            if interruption:
                raise interruption
    except (ValueError, KeyboardInterrupt):
        pass
    assert state_of(causal_lm) == state and not inner.attached
    with torch.no_grad():
        assert torch.equal(causal_lm.model(ids).logits, before)


def test_a_forward_that_fails_leaves_no_trace(lm):
    state = state_of(lm)
    with pytest.raises(IndexError), readout_of(lm).attach(lm) as live:
        lm.model(input_ids=torch.tensor([[10**6]]))
    assert state_of(lm) == state and live.frame().empty


def test_nested_readouts_record_the_same(lm):
    readout, batch = readout_of(lm), batch_of(lm, PROMPTS[:2])
    with readout.attach(lm, prompt=True) as outer, readout.attach(lm, prompt=True) as inner:
        lm.model.generate(**batch, **GREEDY, num_beams=2)
    assert outer.frame().equals(inner.frame()) and len(outer.frame())


# What it refuses


def refusal(readout, lm, **options):
    state = state_of(lm)
    with pytest.raises(ModelError) as refused, readout.attach(lm, **options):
        pytest.fail("a refused block must not be entered")
    assert state_of(lm) == state
    return str(refused.value)


def test_everything_that_is_wrong_is_named_at_once(lm):
    message = refusal(readout_of(lm), lm, concepts=["clam", "xyz"], layers=[1, 2])
    assert "no direction for 'clam': do you mean calm?" in message
    assert "no direction for 'xyz': calm, afraid, proud, sad" in message
    assert "no directions at layers [2]: there are [-1, 1, 3]" in message
    assert "no layers [99]" in refusal(readout_of(lm), lm, layers=[99])
    assert "no concepts to read" in refusal(readout_of(lm), lm, concepts=[])


def test_vectors_of_another_model_are_refused_and_both_are_named(lm, loaded):
    other = readout_of(lm)
    made = other.directions.provenance
    made |= {"model": "another-9b", "revision": "0123"}
    message = refusal(other, lm)
    assert "made for another-9b" in message and lm.name in message
    with other.attach(lm, allow_other_model=True):
        pass
    made["model"] = f"hub/{lm.name.upper()}"
    with other.attach(lm):
        pass  # a hub id and a folder of one name
    made["model"] = "another-9b"
    made["revision"] = lm.revision
    with other.attach(lm):
        pass  # the same weights under another name
    wide = copy.deepcopy(other)
    for layer in LAYERS:
        wide.directions.vectors[layer] = torch.eye(32)[:4]
    message = refusal(wide, lm, allow_other_model=True)
    assert "vectors of 32 do not fit a residual stream of 64" in message
    assert "another-9b" in message and lm.name in message


def test_a_model_without_its_tokenizer_is_refused(lm):
    with pytest.raises(ModelError, match="pass what amy.load_model returns"):
        readout_of(lm).attach(lm.model).__enter__()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "only known in the end"),
        ({"prompt_lookup_num_tokens": 3}, "takes tokens back"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"custom_generate": lambda model, **kwargs: None}, "its own way"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_it_runs(lm, options, said):
    forwards = []
    counting = lm.model.register_forward_hook(lambda *_: forwards.append(1))
    with readout_of(lm).attach(lm, on_token=print) as live:
        with pytest.raises(ModelError, match=said):
            lm.model.generate(**batch_of(lm, PROMPT), **GREEDY | options)
        assert live.frame().empty
    counting.remove()
    assert not forwards


def test_embeddings_in_place_of_tokens_are_refused(lm):
    embedded = lm.model.get_input_embeddings()(batch_of(lm, PROMPT)["input_ids"])
    with readout_of(lm).attach(lm):
        for run in (lm.model, lm.model.generate):
            with pytest.raises(ModelError, match="pass input_ids"):
                run(inputs_embeds=embedded)


def test_a_way_of_generating_that_moves_rows_is_found_out(lm):
    """As a decoder would that this does not know of: what it returns is not what it read."""
    batch = batch_of(lm, PROMPTS[:2])
    generate = lm.model.generate

    def swapped(*given, **options):
        out = generate(*given, **options)
        out.sequences = out.sequences.flip(0)
        return out

    lm.model.generate = swapped
    try:
        with readout_of(lm).attach(lm) as live:
            lm.model.generate(**batch, **GREEDY)
    finally:
        del lm.model.generate
    with pytest.raises(ModelError, match="not seen being read"):
        live.frame()


# Sampling


def drawn(lm, seed, temperature=1.0, n=1):
    batch = batch_of(lm, [PROMPT] * n)
    return lm.model.generate(
        **batch, **GREEDY, logits_processor=[Sampling(seed, temperature)]
    ).tolist()


def test_a_seed_draws_the_same_again_and_leaves_the_global_generator_alone(lm):
    state = torch.get_rng_state()
    first = drawn(lm, 5)
    torch.rand(3)
    assert drawn(lm, 5) == first != drawn(lm, 6)
    torch.set_rng_state(state)
    drawn(lm, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_nought_takes_the_likeliest_token(lm):
    greedy = lm.model.generate(**batch_of(lm, PROMPT), **GREEDY).tolist()
    assert drawn(lm, 1, temperature=0) == drawn(lm, 2, temperature=0) == greedy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    scores = torch.tensor([2.0, 0.0, -1.0, 1.0, -math.inf]).repeat(20000, 1)
    draws = Sampling(0, temperature)(torch.empty(20000, 0), scores).argmax(1)
    found = torch.bincount(draws, minlength=5) / 20000
    expected = (scores[0] / temperature).softmax(0)
    assert (found - expected).abs().max() < 0.015
    assert found[4] == 0


@pytest.mark.parametrize("temperature", [-1, math.nan])
def test_no_temperature_below_nought(temperature):
    with pytest.raises(AmygdalaError, match="temperature is"):
        Sampling(0, temperature)


# The benchmark


@pytest.mark.slow
def test_the_benchmark_compares_the_same_decoding_with_and_without(tmp_path):
    out = tmp_path / "figures.json"
    small = ["--repeats", "2", "--tokens", "4", "--hidden", "128", "--depth", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_readout", *small, "--json", str(out)],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert list(figures) == ["demo", "random, hidden 128"]
    for found in figures.values():
        assert [len(times) for times in found["seconds"].values()] == [2, 2]
        assert len(found["ratios"]) == 2 and min(found["ratios"]) > 0
        assert f"time {found['ratio']:.4f} of without" in done.stdout
