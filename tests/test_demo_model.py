"""The bundled model: small, plain to load, and able to do what its card says."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import amygdala_lib as amy
from amygdala_lib.artefacts import repository_root
from amygdala_lib.demo import evaluate, release, train
from amygdala_lib.demo.affect_world import AffectWorld
from amygdala_lib.demo.evaluate import SteeringPoint
from amygdala_lib.errors import ModelError
from amygdala_lib.models import DEMO_FOLDER


@pytest.fixture(scope="module")
def lm():
    return amy.load_model("demo")


@pytest.fixture(scope="module")
def figures():
    return json.loads((DEMO_FOLDER / "evaluation.json").read_text())


def test_it_is_at_most_twenty_megabytes():
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 20e6


def test_transformers_loads_it_without_amygdala():
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    ids = tokenizer("Anna came to the harbour in the morning.", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] == ids["input_ids"].shape[1] + 5


def test_it_is_a_hybrid_that_vllm_can_serve_on_a_cpu(lm):
    config = lm.model.config
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert config.linear_key_head_dim in (64, 128) and config.linear_value_head_dim in (64, 128)
    assert config.head_dim == 64


@pytest.mark.parametrize(
    "text", ["Anna came.", 'Ünïcode and "quotes"\n\tindeed: 123', "我感到平静"]
)
def test_its_tokenizer_spells_anything(lm, text):
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text


def test_it_was_taught_the_grammar_as_it_is_now(lm):
    """Every sentence of the world is cheap; a grammar changed after training is not."""
    world, rng = AffectWorld(), random.Random(0)
    stories = [world.story(rng, state).text for state in world.states]
    assert evaluate.perplexity(lm, [s.split(". ")[0] + "." for s in stories], [
        " " + s.split(". ", 1)[1] for s in stories
    ]) < 4  # fmt: skip


def test_its_card_tells_the_figures_of_its_evaluation(lm, figures):
    card = (DEMO_FOLDER / "README.md").read_text()
    claims, stories = card.split("## Ten stories")
    assert claims == release.card(lm, AffectWorld(), figures).split("## Ten stories")[0]
    assert stories.count("> **") == 10


def test_a_release_without_checkpoints_is_refused_and_the_model_stays(tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="demo.train"):
        release.release(tmp_path / "nothing", out)
    assert (out / "config.json").exists()


@pytest.mark.slow
def test_it_stays_in_the_state_of_a_cue(lm, figures):
    measured = evaluate.carry(lm, AffectWorld(), "train", per_state=8).mean()
    reported = sum(figures["carry"]["train"].values()) / len(figures["carry"]["train"])
    assert measured == pytest.approx(reported, abs=0.1)
    assert measured > 0.5


@pytest.mark.slow
def test_pushing_it_toward_a_state_makes_it_write_that_state(lm, figures):
    world = AffectWorld()
    dirs = release.directions_of(lm, world)
    reported = figures["steering"]["states"]
    states = ["afraid", "happy", "calm"]
    points = {s: SteeringPoint(reported[s]["layer"], reported[s]["strength"]) for s in states}
    steered = evaluate.steering(lm, dirs, world, "test", points, states=states, per_state=8)
    control = evaluate.steering(
        lm, evaluate.random_directions(dirs), world, "test", points, states=states, per_state=8
    )
    assert steered["target"].mean() > 0.4 > control["target"].mean()


@pytest.mark.slow
def test_training_repeats_to_the_byte(tmp_path):
    def weights(name):
        folder = train.train(
            tmp_path / name, repository_root() / "corpus", steps=3, compiled=False
        )[-1]
        return (folder / "model.safetensors").read_bytes()

    assert weights("a") == weights("b")
