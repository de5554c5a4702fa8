"""The dose test finds what rises with a number, and nothing where nothing does."""

import copy
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from planted import activations

from amygdala_lib import Directions, capture, extract
from amygdala_lib.corpus import load_corpus
from amygdala_lib.corpus_prose import family_uses
from amygdala_lib.errors import AmygdalaError, ModelError
from amygdala_lib.evaluate import dose, dose_test, load_doses
from amygdala_lib.evaluate.baselines import random_directions
from amygdala_lib.readout import Readout

HIDDEN = 32
CONCEPTS = ["afraid", "calm", "proud", "sad"]
CONTROL = "Number {dose} is on the next page."
SHIPPED = Path(dose.__file__).with_name("doses.yaml")


def scenario(name="heights", concepts=None, **changes):
    return {
        "name": name,
        "text": f"In {name} there are {{dose}} of them. She went on.",
        "doses": [1, 2, 4, 8, 16, 32, 64, 1000],
        "concepts": concepts or {"afraid": 1, "calm": -1},
    } | changes


def content(*scenarios, **changes):
    return {"control": CONTROL, "scenarios": list(scenarios) or [scenario()]} | changes


def readout_of(vectors, concepts=CONCEPTS, layer=2, **changes):
    n = len(vectors)
    held = {"vectors": vectors, "means": torch.zeros(n), "stds": torch.ones(n)}
    by_layer = {name: {layer: values} for name, values in held.items()}
    facts = {"concepts": list(concepts)[:n], "residual_norms": {layer: 1.0}}
    return Readout(Directions(**facts | by_layer | changes))


def planted(slope, *, noise=1.0, nuisance=30.0, in_control=0.0, seed=0):
    """A test of prompts that a rising dose moves by `slope` along afraid, and against calm.

    Everything else in them is noise, of deviation `noise` along each axis and `nuisance` along
    those that no concept lies in.
    """
    made = [scenario(f"place {i}", {name: 1 for name in CONCEPTS} | {"calm": -1}) for i in range(6)]
    doses = load_doses(content(*made))
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
    vectors, others = axes[: len(CONCEPTS)], axes[len(CONCEPTS) :]
    push = vectors[0] - vectors[1]
    rows = {}
    for each in doses.scenarios:
        for text, strength in ((each.text, slope), (doses.control, in_control)):
            for step, number in enumerate(each.doses):
                moved = noise * torch.randn(HIDDEN, generator=generator) + strength * step * push
                moved += nuisance * torch.randn(len(others), generator=generator) @ others
                rows.setdefault(text.replace("{dose}", f"{number:,}"), moved)
    acts = activations(list(rows), torch.stack(list(rows.values())))
    readout = readout_of(vectors)
    return dose.from_activations(acts, readout, doses, 2, draws=500, seed=seed)


# Figures


@given(scores=st.lists(st.integers(-5, 5), min_size=2, max_size=12))
def test_rho_is_that_of_scipy_and_zero_where_nothing_changes(scores):
    scores = np.array(scores, dtype=float)
    if len(set(scores)) == 1:
        assert dose.spearman(scores) == 0
    else:
        expected = scipy.stats.spearmanr(np.arange(len(scores)), scores).statistic
        assert dose.spearman(scores) == pytest.approx(expected)


@given(scores=st.lists(st.integers(-3, 3), min_size=3, max_size=6))
def test_p_is_the_share_of_all_orders_that_do_as_well_with_ties_too(scores):
    orders = np.array(list(itertools.permutations(scores)), dtype=float)
    as_high = dose.spearman(orders) >= dose.spearman(np.array(scores, dtype=float)) - 1e-9
    assert dose.p_of_rise(np.array(scores, dtype=float)) == pytest.approx(as_high.mean())


def test_p_is_exact_at_the_largest_number_of_doses():
    rising = np.arange(12.0)
    assert dose.p_of_rise(rising) == pytest.approx(1 / 479001600)
    assert dose.p_of_rise(-rising) == 1
    rng = np.random.default_rng(0)
    scores = rng.permutation(12) + rising / 3
    drawn = dose.spearman(rng.permuted(np.tile(scores, (20000, 1)), axis=1))
    share = (drawn >= dose.spearman(scores) - 1e-9).mean()
    assert dose.p_of_rise(scores) == pytest.approx(share, abs=0.015)


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_its_definition(p):
    ordered = sorted(p)
    steps = {v: min(1, (len(p) - i) * v) for i, v in reversed(list(enumerate(ordered)))}
    expected = [max(step for value, step in steps.items() if value <= one) for one in p]
    assert dose.holm(np.array(p)) == pytest.approx(expected)


def test_random_directions_have_the_cosines_of_the_concepts_and_follow_the_same_content():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, HIDDEN, generator=generator)
    cosines = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    rows = list(range(8))
    found = dose.random_rhos(values, cosines, [(0, rows), (1, rows), (2, rows)], 250, 0)
    assert found.shape == (250, 3)
    assert np.allclose(found[:, 0], found[:, 1])
    assert np.allclose(found[:, 0], -found[:, 2])
    apart = dose.random_rhos(values, torch.eye(3), [(0, rows), (1, rows)], 2000, 0)
    assert abs(np.corrcoef(apart.T)[0, 1]) < 0.1


def test_random_directions_are_those_of_baselines_in_distribution():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10, HIDDEN, generator=generator) * torch.linspace(0.1, 3, HIDDEN)
    values += torch.linspace(0, 3, 10)[:, None]
    one = dose.random_rhos(values, torch.eye(1), [(0, list(range(10)))], 2000, 0)[:, 0]
    other = dose.spearman((random_directions(values, 2000, 1) @ values.T).numpy())
    assert scipy.stats.ks_2samp(np.round(one, 6), np.round(other, 6)).pvalue > 0.01


# What is planted


def test_a_score_that_rises_with_the_dose_is_shown():
    found = planted(3.0)
    frame = found.frame.set_index(["scenario", "concept"])
    for place in (f"place {i}" for i in range(6)):
        assert frame.loc[(place, "afraid"), "rho"] > 0.97
        assert frame.loc[(place, "calm"), "rho"] < -0.97
        assert (frame.loc[[(place, "afraid"), (place, "calm")], "p_adjusted"] < 0.01).all()
    assert (frame["p_adjusted"] >= frame["p"]).all()
    assert found.frame.loc[found.frame["expected"] == -1, "change"].max() < -5
    assert found.p_agreement < 0.01
    assert frame["shown"].groupby("concept").mean().to_dict() == {
        "afraid": 1, "calm": 1, "proud": 0, "sad": 0,
    }  # fmt: skip
    assert "12 of 24 pairs move as expected" in found.summary()
    assert found.finding.startswith("12 of 24 pairs follow the dose")
    assert abs(found.control_agreement) < 0.5


def test_a_perfect_rise_has_rho_1_and_the_smallest_p():
    frame = planted(3.0, noise=1e-3).frame.set_index("concept")
    assert frame.loc["afraid", "rho"].to_numpy() == pytest.approx(1)
    assert frame.loc["afraid", "p"].to_numpy() == pytest.approx(1 / 40320)
    assert frame.loc["calm", "rho"].to_numpy() == pytest.approx(-1)
    assert frame.loc["calm", "p"].to_numpy() == pytest.approx(1 / 40320)


def test_where_nothing_rises_nothing_is_shown_and_the_summary_says_so():
    frames, all_together = [], []
    for seed in range(20):
        found = planted(0.0, seed=seed)
        frames.append(found.frame)
        all_together.append(found.p_agreement)
        if not found.frame["shown"].any() and found.p_agreement >= 0.05:
            assert "NOTHING IS SHOWN" in found.summary()
            assert found.finding.startswith("None of ")
    # Holm lets any pair through in one test of twenty.
    assert sum(frame["shown"].any() for frame in frames) <= 3
    for column in ("p", "random_share"):
        values = np.concatenate([frame[column] for frame in frames])
        assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(all_together, "uniform").pvalue > 0.01


def test_where_nothing_but_the_dose_varies_random_directions_follow_it_as_well():
    found = planted(3.0, nuisance=1.0)
    of_afraid = found.frame[found.frame["concept"] == "afraid"]
    assert (of_afraid["p_adjusted"] < 0.01).all()
    assert (of_afraid["random_share"] > 0.05).all()
    assert not found.frame["shown"].any()
    assert "no more than random directions do" in " ".join(found.summary().split())


def test_the_share_of_random_directions_is_uniform_for_a_random_direction():
    """Even where all prompts move along one line, and the exact p of most directions is tiny."""
    shares, ps = [], []
    doses = load_doses(content(scenario(concepts={"afraid": 1})))
    texts = [t.replace("{dose}", f"{n:,}") for t in (doses.scenarios[0].text, CONTROL)
             for n in doses.scenarios[0].doses]  # fmt: skip
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(16, HIDDEN, generator=generator)
        values += torch.arange(16)[:, None] * torch.randn(HIDDEN, generator=generator)
        weights = torch.randn(1, 16, generator=generator)
        vector = torch.nn.functional.normalize(weights @ (values - values.mean(0)))
        found = dose.from_activations(
            activations(texts, values), readout_of(vector), doses, 2, draws=200, seed=1000 + seed
        )
        shares.append(found.frame["random_share"].item())
        ps.append(found.frame["p"].item())
    # Ties at rho 1 only make the share larger, never smaller.
    for level in (0.05, 0.1, 0.25):
        assert np.mean(np.array(shares) <= level) <= level + 0.06
    assert np.mean(np.array(ps) <= 0.001) > 0.3


def test_what_numbers_do_by_themselves_is_not_shown():
    found = planted(3.0, in_control=6.0)
    frame = found.frame[found.frame["concept"].isin(["afraid", "calm"])]
    assert (frame["p_adjusted"] < 0.05).all()
    assert (frame["control_p_adjusted"] < 0.05).all()
    assert not frame["shown"].any()
    assert found.control_agreement > 0.3


# With models


@pytest.fixture(scope="module")
def of_model(loaded, corpus):
    acts = capture(loaded("qwen3_5"), corpus, [-1, 0, 3], progress=False)
    return Readout(extract(acts, corpus))


def small(**changes):
    made = [scenario("place a"), scenario("place b", {"afraid": 1, "proud": -1, "homesick": 1})]
    return load_doses(content(*made, **changes))


def test_every_family_of_models_is_read(any_lm, corpus):
    readout = Readout(extract(capture(any_lm, corpus, [2], progress=False), corpus))
    found = dose_test(any_lm, readout, small(), draws=50)
    assert list(found.frame["concept"]) == ["afraid", "calm", "afraid", "proud"]
    assert found.left_out == ["homesick"]
    assert np.isfinite(found.frame.select_dtypes("number").to_numpy()).all()


def test_the_curves_are_the_z_scores_of_the_prompts(lm, of_model):
    doses = small()
    found = dose_test(lm, of_model, doses, layer=3, pool="mean", draws=50)
    curves = found.curves
    assert list(curves) == ["scenario", "concept", "expected", "dose", "score", "control_score"]
    one = curves[(curves["scenario"] == "place b") & (curves["concept"] == "proud")]
    assert one["dose"].tolist() == [1, 2, 4, 8, 16, 32, 64, 1000]
    column = of_model.directions.index("proud")
    for text, name in ((doses.scenarios[1].text, "score"), (CONTROL, "control_score")):
        texts = [text.replace("{dose}", f"{n:,}") for n in one["dose"]]
        acts = capture(lm, texts, [3], pool="mean", cache=None, progress=False)
        expected = of_model.project(acts[3], 3)[:, column]
        assert np.allclose(one[name], expected, atol=1e-3)
    row = found.frame[found.frame["concept"] == "proud"].iloc[0]
    expected = scipy.stats.spearmanr(one["dose"], one["score"]).statistic
    assert row["rho"] == pytest.approx(expected)


def test_thousands_are_written_with_commas(lm, of_model):
    texts = dose._filled("{dose} steps", [0.5, 7, 1000, 2000000])
    assert texts == ["0.5 steps", "7 steps", "1,000 steps", "2,000,000 steps"]


def test_the_same_seed_gives_the_same_test_and_the_default_layer_is_at_two_thirds(lm, of_model):
    one, other = (dose_test(lm, of_model, small(), draws=60, seed=3) for _ in range(2))
    assert one.frame.equals(other.frame)
    assert one.p_agreement == other.p_agreement
    assert one.provenance["layer"] == 3
    assert one.provenance["pool"] == "last"


def test_embeddings_of_the_last_token_know_no_dose(lm, of_model):
    found = dose_test(lm, of_model, small(), layer=-1, draws=50)
    assert (found.frame["rho"] == 0).all()
    assert (found.frame["p"] == 1).all()
    assert not found.frame["shown"].any()
    assert "score the same at every dose" in found.summary()


def test_the_summary_of_the_shipped_doses_fits_a_screen(lm, of_model):
    found = dose_test(lm, of_model, draws=100)
    lines = found.summary().splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 100
    assert "left out" in "".join(lines)


def test_the_summary_lists_what_is_shown_and_no_more_than_a_screen_holds():
    made = planted(3.0)
    frame = made.frame.assign(shown=True)
    text = dataclasses.replace(made, frame=frame).summary()
    assert len(text.splitlines()) < 24
    assert "24 of 24 pairs move as expected" in text
    assert "14 more in .frame" in text


def test_the_summary_tells_pairs_apart_from_all_of_them_together():
    made = planted(3.0)
    none = dataclasses.replace(made, frame=made.frame.assign(shown=False))
    assert none.p_agreement < 0.05
    assert "No single pair is shown" in none.summary()
    by_numbers = dataclasses.replace(none, control_agreement=none.agreement + 0.1)
    assert "NOTHING IS SHOWN" in by_numbers.summary()
    by_luck = dataclasses.replace(made, p_agreement=0.3)
    assert "may be luck" in by_luck.summary()


def test_all_wrong_arguments_are_named_at_once(lm, of_model):
    dirs = of_model.directions
    stds = {layer: values.clone() for layer, values in dirs.stds.items()}
    stds[3][0] = 0
    flawed = Readout(dataclasses.replace(dirs, stds=stds))
    with pytest.raises(AmygdalaError) as raised:
        dose_test(lm, flawed, small(), layer=3, pool="tokens", draws=0)
    for part in ("pool is 'tokens'", "draws is 0", "calm"):
        assert part in str(raised.value)
    narrow = readout_of(torch.eye(4, HIDDEN), ["a", "b", "c", "d"], layer=9)
    with pytest.raises(AmygdalaError) as raised:
        dose_test(lm, narrow, small())
    for part in ("no layer 9", "hidden size of 64, the readout 32", "none of the concepts"):
        assert part in str(raised.value)
    with pytest.raises(AmygdalaError, match=r"the doses: is \[1, 2\], not an object"):
        dose_test(lm, of_model, [1, 2])
    with pytest.raises(AmygdalaError, match="this readout has no layer 1"):
        dose_test(lm, of_model, small(), layer=1)


def test_prompts_too_long_for_the_model_are_refused(lm, of_model):
    long = content(scenario(text="{dose} " + "and so on " * 400))
    with pytest.raises(ModelError, match="split it"):
        dose_test(lm, of_model, long)


# Files


def test_the_shipped_scenarios_are_many_and_the_last_token_is_not_the_number():
    doses = load_doses()
    assert len(doses.scenarios) >= 12
    assert len({s.text for s in doses.scenarios}) == len(doses.scenarios)
    assert any(way == -1 for s in doses.scenarios for way in s.concepts.values())
    for text in (doses.control, *(s.text for s in doses.scenarios)):
        assert len(re.findall(r"\w+", text.split("{dose}")[1])) >= 4
        assert text.isascii()


def test_the_shipped_scenarios_name_concepts_of_the_manifest_and_no_feeling():
    root = Path(__file__).parents[1] / "corpus"
    if not root.is_dir():
        pytest.skip("the corpus is not beside the library")
    manifest = load_corpus(root).manifest
    doses = load_doses()
    for each in doses.scenarios:
        assert set(each.concepts) <= set(manifest)
        told = [use for concept in manifest.values() for use in family_uses(concept, each.text)]
        assert not told, f"{each.name}: {told}"


def test_doses_are_read_from_a_file_or_a_mapping_alike(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content()), encoding="utf-8")
    assert load_doses(path) == load_doses(str(path)) == load_doses(content())
    assert load_doses() == load_doses(SHIPPED)


def test_everything_wrong_with_doses_is_said_at_once():
    bad = content(
        scenario("one", text="no hole"),
        scenario("one", text="{dose} and {dose}"),
        scenario("three", doses=[1, 2, 3]),
        scenario("four", doses=[1, 2, 3, 3, 5, 6, 4, 8]),
        scenario("five", doses=[1, 2, "many", True, float("nan"), 6, 7, 8]),
        scenario("six", doses="1 to 8"),
        scenario("seven", {"afraid": 2, "calm": "up", "proud": True}),
        scenario("eight", concepts=None) | {"concepts": []},
        scenario(None, mood=3),
        "a sentence",
        control="nothing here",
        extra=1,
    )
    untouched = copy.deepcopy(bad)
    with pytest.raises(AmygdalaError) as raised:
        load_doses(bad)
    said = str(raised.value)
    for part in (
        "unknown field 'extra'", "control has 0 holes", "scenario one: text has 0 holes",
        "scenario one: text has 2 holes", "scenario three: 3 doses", "scenario four: doses must",
        "3 after 3, 4 after 6", "scenario five: doses 'many', True, nan are not finite",
        "scenario six: doses is '1 to 8'", "'afraid' is 2", "'calm' is 'up'", "'proud' is True",
        "scenario eight: concepts is []", "scenario 9: name is None", "unknown field 'mood'",
        "scenario 10 is 'a sentence'", "scenario one: several have this name",
    ):  # fmt: skip
        assert part in said, part
    assert str(bad) == str(untouched)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[1, 2", "cannot be read as YAML"),
        ("just words", "is 'just words'"),
        ("control: '{dose} of it'\nscenarios: []", r"scenarios is \[\]"),
        ("", "is None"),
    ],
)
def test_files_that_are_no_doses_are_refused_with_their_name(tmp_path, written, said):
    path = tmp_path / "mine.yaml"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(AmygdalaError, match=said) as raised:
        load_doses(path)
    assert "mine.yaml" in str(raised.value)
    with pytest.raises(AmygdalaError, match="cannot be read"):
        load_doses(tmp_path / "absent.yaml")
