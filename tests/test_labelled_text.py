"""A readout is compared with people's labels as scikit-learn would compare it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import CONCEPTLESS, SENTENCES
from sklearn.metrics import average_precision_score, roc_auc_score

from amygdala_lib import capture, extract
from amygdala_lib.artefacts import repository_root
from amygdala_lib.errors import AmygdalaError
from amygdala_lib.labelled_text import evaluate_on, label_map
from amygdala_lib.readout import Readout

SHIPPED = {"goemotions": 28, "isear": 7, "empathetic_dialogues": 32}
OURS = {"Fear": "afraid", "ease": ["calm", "proud"], "neutral": None}


@pytest.fixture(scope="module")
def readout(loaded, corpus):
    acts = capture(loaded("qwen3_5"), corpus, [0, 2], pool="mean", progress=False)
    return Readout(extract(acts, corpus))


@pytest.fixture
def own_texts():
    """The texts that the directions were made of, each with its concept as its label."""
    rows = [(text, concept) for concept, texts in SENTENCES.items() for text in texts]
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.fixture
def labelled(own_texts):
    """The same and two more, under the labels of another collection."""
    names = {"calm": "ease", "proud": "ease", "afraid": "fear"}
    rest = pd.DataFrame({"text": CONCEPTLESS, "label": "neutral"})
    return pd.concat([own_texts.replace({"label": names}), rest], ignore_index=True)


def z_scores(lm, readout, texts, layer):
    acts = capture(lm, list(texts), [layer], pool="mean", progress=False)
    return pd.DataFrame(
        readout.project(acts[layer], layer).numpy(), acts.texts, readout.directions.concepts
    ).loc[list(texts)]


# The figures


def test_auroc_and_average_precision_are_those_of_scikit_learn_on_the_projections(
    lm, readout, labelled
):
    found = evaluate_on(labelled, readout, lm, mapping=OURS, layer=2)
    z = z_scores(lm, readout, labelled["text"], 2)
    scores = {"fear": z["afraid"], "ease": z[["calm", "proud"]].max(axis=1)}
    assert found.frame.index.tolist() == ["fear", "ease"]
    for label, score in scores.items():
        row, truth = found.frame.loc[label], labelled["label"] == label
        assert np.isclose(row["auroc"], roc_auc_score(truth, score))
        assert np.isclose(row["average_precision"], average_precision_score(truth, score))
        assert row["n"] == truth.sum()
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert np.allclose(found.scores[label], score, atol=1e-5)
    assert np.isclose(found.macro_auroc, found.frame["auroc"].mean())
    assert found.frame.loc["ease", "concepts"] == "calm, proud"
    assert found.unmapped == {"neutral": 2}


def test_the_texts_that_directions_were_made_of_are_told_apart(lm, readout, own_texts):
    found = evaluate_on(own_texts, readout, lm)
    assert found.macro_auroc > 0.9
    assert found.top_1 > 0.6
    assert np.isclose(found.chance, 1 / 3)
    assert found.macro_interval[0] > 0.7


def test_labels_given_at_random_are_at_chance(lm, readout, texts):
    rng = np.random.default_rng(0)
    aurocs = []
    for _ in range(10):
        labels = rng.permutation(["calm", "afraid", "proud", "calm"] * 8)
        frame = pd.DataFrame({"text": texts, "label": labels})
        found = evaluate_on(frame, readout, lm, layer=2)
        aurocs.append(found.macro_auroc)
    assert abs(np.mean(aurocs) - 0.5) < 0.08


def test_top_1_standardises_each_label_and_counts_any_true_label_as_a_hit(lm, readout, texts):
    rng = np.random.default_rng(1)
    truth = rng.random((32, 3)) < 0.4
    frame = pd.DataFrame(truth.astype(int), columns=["calm", "afraid", "proud"]).assign(text=texts)
    found = evaluate_on(frame, readout, lm, label=["calm", "afraid", "proud"], layer=2)
    z = z_scores(lm, readout, texts, 2).to_numpy()
    best = ((z - z.mean(0)) / z.std(0)).argmax(1)
    asked = truth.any(1)
    assert np.isclose(found.top_1, truth[np.arange(32), best][asked].mean())
    assert np.isclose(found.chance, truth[asked].mean())
    assert found.top_1_interval[0] <= found.top_1 <= found.top_1_interval[1]
    assert (found.truth.to_numpy() == truth).all()


def test_an_interval_is_that_of_resampled_texts(lm, readout, texts):
    truth = np.random.default_rng(2).random(32) < 0.5
    frame = pd.DataFrame({"text": texts, "label": np.where(truth, "calm", "afraid")})
    found = evaluate_on(frame, readout, lm, layer=2)
    score = found.scores["calm"].to_numpy()
    rng, drawn = np.random.default_rng(5), []
    while len(drawn) < 500:
        rows = rng.integers(32, size=32)
        if 0 < truth[rows].sum() < 32:
            drawn.append(roc_auc_score(truth[rows], score[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    row = found.frame.loc["calm"]
    assert abs(row["auroc_low"] - low) < 0.05 and abs(row["auroc_high"] - high) < 0.05


def test_a_label_that_no_text_has_is_not_counted(lm, readout, own_texts):
    two = own_texts[own_texts["label"] != "proud"]
    found = evaluate_on(two, readout, lm)
    assert found.frame.loc["proud", "n"] == 0
    assert found.frame.loc["proud", ["auroc", "auroc_low", "average_precision"]].isna().all()
    assert np.isclose(found.macro_auroc, found.frame["auroc"].dropna().mean())
    assert found.chance == 0.5


def test_the_same_seed_gives_the_same_figures(lm, readout, labelled):
    one, two = (evaluate_on(labelled, readout, lm, mapping=OURS, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(one.frame, two.frame)
    assert one.summary() == two.summary()


def test_the_summary_says_the_figures_and_what_was_left_out(lm, readout, labelled):
    found = evaluate_on(labelled, readout, lm, mapping=OURS, layer=0)
    said = found.summary()
    assert "13 texts, 2 labels, layer 0" in said
    assert f"macro AUROC {found.macro_auroc:.3f}" in said
    assert f"top-1 accuracy {found.top_1:.3f}" in said and "on the 11 texts" in said
    assert "no concept for: neutral (2)" in said


# Forms of input


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_a_file_gives_what_its_frame_gives(lm, readout, labelled, tmp_path, form):
    path = tmp_path / f"texts.{form}"
    if form == "jsonl":
        rows = labelled.assign(label=[[label] for label in labelled["label"]]).to_dict("records")
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        labelled.to_csv(path, sep="\t" if form == "tsv" else ",", index=False)
    expected = evaluate_on(labelled, readout, lm, mapping=OURS)
    pd.testing.assert_frame_equal(
        evaluate_on(path, readout, lm, mapping=OURS).frame, expected.frame
    )


@pytest.mark.parametrize(
    "cell",
    [
        ["afraid", "proud"],
        ("Afraid", "proud"),
        np.array(["afraid", "proud"]),
        "afraid, Proud",
        "proud;afraid",
        "['afraid', 'proud']",
        '["afraid","proud"]',
    ],
    ids=str,
)
def test_several_labels_in_a_cell_are_several_labels(lm, readout, cell):
    frame = pd.DataFrame({"said": ["one thing", "another", "a third"]})
    frame["feeling"] = pd.Series([cell, "calm", []], dtype=object)
    found = evaluate_on(frame, readout, lm, text="said", label="feeling")
    assert found.truth.loc["one thing"].tolist() == [False, True, True]
    assert found.truth.loc["another"].tolist() == [True, False, False]
    assert not found.truth.loc["a third"].any()


@pytest.mark.parametrize("numbers", [[2, 14, 25], ["2", "14", "25"], [[2], [14], [25]]])
def test_the_numbers_of_goemotions_stand_for_its_labels(lm, readout, numbers):
    frame = pd.DataFrame({"text": ["a slammed door", "a creak", "rain"], "label": numbers})
    found = evaluate_on(frame, readout, lm, mapping="goemotions")
    assert found.frame.index.tolist() == ["fear", "pride"]
    assert found.truth["fear"].tolist() == [False, True, False]
    assert found.unmapped == {"anger": 1, "sadness": 1}
    assert any("not in this readout, and left out: " in note for note in found.notes)


def test_commas_of_empathetic_dialogues_are_put_back(lm, readout):
    frame = pd.DataFrame({"prompt": ["dark_comma_ cold", "won"], "context": ["afraid", "proud"]})
    found = evaluate_on(
        frame, readout, lm, text="prompt", label="context", mapping="empathetic_dialogues"
    )
    assert found.scores.index.tolist() == ["dark, cold", "won"]


def test_rows_of_one_text_are_one_text_with_the_labels_of_all(lm, readout, own_texts):
    again = own_texts.head(1).assign(label="proud")
    found = evaluate_on(pd.concat([own_texts, again]), readout, lm)
    assert len(found.scores) == len(own_texts)
    assert found.truth.iloc[0].tolist() == [True, False, True]
    assert "1 rows repeat a text: their labels were joined" in found.notes


def test_texts_longer_than_the_model_reads_are_cut_and_counted(lm, readout, own_texts):
    long = " ".join(SENTENCES["calm"] * 60)
    frame = pd.concat(
        [own_texts, pd.DataFrame({"text": [long, long + " The end."], "label": "calm"})]
    )
    found = evaluate_on(frame, readout, lm)
    assert any(note.startswith("2 texts were cut") for note in found.notes)
    last = found.scores.to_numpy()[-2:]
    assert np.array_equal(last[0], last[1])  # they differ beyond the cut alone


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_cut_leaves_room_for_special_tokens(loaded, corpus, family):
    lm = loaded(family)
    readout = Readout(extract(capture(lm, corpus, [2], pool="mean", progress=False), corpus))
    frame = pd.DataFrame({"text": [" ".join(SENTENCES["proud"] * 60), "no"]})
    found = evaluate_on(frame.assign(label=["proud", "calm"]), readout, lm)
    assert any(note.startswith("1 texts were cut") for note in found.notes)


def test_as_many_texts_as_asked_for_are_drawn(lm, readout, own_texts):
    found = evaluate_on(own_texts, readout, lm, max_texts=9, seed=1)
    assert len(found.scores) == 9
    assert "9 of 11 texts, drawn at random with seed 1" in found.notes
    again = evaluate_on(own_texts, readout, lm, max_texts=9, seed=1)
    assert again.scores.index.equals(found.scores.index)


def test_the_layer_nearest_to_two_thirds_of_depth_is_read_if_none_is_named(lm, readout, own_texts):
    assert evaluate_on(own_texts, readout, lm).layer == 2
    assert evaluate_on(own_texts, readout, lm, layer=0).layer == 0


def test_another_pool_than_the_directions_were_made_with_is_noted(lm, readout, own_texts):
    found = evaluate_on(own_texts, readout, lm, pool="last")
    assert any("made with pool='mean'" in note for note in found.notes)
    assert evaluate_on(own_texts, readout, lm).notes == []


# Mappings


@pytest.mark.parametrize("name", SHIPPED)
def test_every_concept_of_a_shipped_mapping_is_one_of_the_corpus(name):
    manifest = yaml.safe_load((repository_root() / "corpus/manifest.yaml").read_text())
    mapping = label_map(name)
    assert len(mapping) == SHIPPED[name]
    assert {c for found in mapping.values() for c in found or ()} <= {*manifest["concepts"]}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_two_labels_of_a_shipped_mapping_share_a_concept(name):
    concepts = [c for found in label_map(name).values() for c in found or ()]
    assert len(concepts) == len({*concepts})


def test_goemotions_is_in_the_order_of_its_numbers():
    labels = list(label_map("goemotions"))
    assert labels[:27] == sorted(labels[:27]) and labels[27] == "neutral"


def test_an_unknown_mapping_is_refused_with_those_there_are(lm, readout, labelled):
    with pytest.raises(AmygdalaError, match="no mapping 'goemotion'.*did you mean 'goemotions'"):
        evaluate_on(labelled, readout, lm, mapping="goemotion")


# What is refused


def test_all_that_is_wrong_with_a_table_is_said_at_once_by_row(lm, readout):
    frame = pd.DataFrame(
        {
            "text": ["good", "  ", None, 7, "fine"],
            "label": ["calm", "clam", "afraid", "joy, clam", None],
        }
    )
    with pytest.raises(AmygdalaError) as error:
        evaluate_on(frame, readout, lm)
    said = str(error.value)
    assert "the text is empty in 2 rows (1, 2)" in said
    assert "the text is not a string in row 3: 7" in said
    assert "no label in row 4" in said
    assert "unknown label 'clam' in 2 rows (1, 3) (did you mean 'calm'?)" in said
    assert "unknown label 'joy' in row 3" in said


def test_wrong_arguments_and_columns_are_said_together(lm, readout, labelled):
    with pytest.raises(AmygdalaError) as error:
        evaluate_on(
            labelled, readout, lm, text="txt", label=["joy", "label"], layer=4, pool="tokens",
            max_texts=1, mapping={"ease": "clam"},
        )  # fmt: skip
    said = str(error.value)
    assert "no column 'txt', 'joy': there are text, label" in said
    assert "no layer 4: it has [0, 2]" in said
    assert "pool is 'tokens'" in said and "max_texts is 1" in said
    assert "'ease' is mapped to 'clam', which this readout does not have (did you mean" in said


def test_cells_that_are_not_0_or_1_are_named(lm, readout):
    frame = pd.DataFrame({"text": ["a", "b"], "calm": ["1", "yes"], "afraid": [2, 0]})
    with pytest.raises(AmygdalaError) as error:
        evaluate_on(frame, readout, lm, label=["calm", "afraid"])
    assert "calm is not 0 or 1 in row 1 (first: 'yes')" in str(error.value)
    assert "afraid is not 0 or 1 in row 0" in str(error.value)


def test_a_readout_of_another_model_is_refused(lm, own_texts, readout):
    directions = readout.directions
    narrow = {layer: torch.eye(3) for layer in directions.layers}
    other = Readout(type(directions)(**{**vars(directions), "vectors": narrow}))
    with pytest.raises(AmygdalaError, match="hidden size of 64, the readout 3"):
        evaluate_on(own_texts, other, lm)


def test_one_label_on_every_text_has_nothing_to_be_told_from(lm, readout, own_texts):
    with pytest.raises(AmygdalaError, match="nothing to tell apart.*labels there: calm"):
        evaluate_on(own_texts[own_texts["label"] == "calm"], readout, lm)


def test_files_that_cannot_be_read_are_refused(lm, readout, tmp_path):
    with pytest.raises(AmygdalaError, match="no file .*nowhere.csv"):
        evaluate_on(tmp_path / "nowhere.csv", readout, lm)
    with pytest.raises(AmygdalaError, match="is not .csv, .tsv or .jsonl"):
        evaluate_on(tmp_path / "texts.parquet", readout, lm)
    (tmp_path / "bad.csv").write_text("text,label\na,calm\nb,calm,1,2\n")
    with pytest.raises(AmygdalaError, match="bad.csv cannot be read.*line 3"):
        evaluate_on(tmp_path / "bad.csv", readout, lm)
    for line in ("not json", "[1, 2]"):
        (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "calm"}\n\n' + line)
        with pytest.raises(AmygdalaError, match="bad.jsonl cannot be read .line 3"):
            evaluate_on(tmp_path / "bad.jsonl", readout, lm)
    with pytest.raises(AmygdalaError, match="there are no rows"):
        evaluate_on(pd.DataFrame({"text": [], "label": []}), readout, lm)
