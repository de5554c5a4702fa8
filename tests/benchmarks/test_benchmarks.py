"""The benchmarks run as their README says, and what they compare is the same thing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from amygdala_lib.artefacts import repository_root
from amygdala_lib.directions import methods
from amygdala_lib.models import default_layers, load_model


def run(*arguments: str, module: str = "bench_capture") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_capture_is_compared_with_the_same_thing_done_another_way(tmp_path):
    out = tmp_path / "figures.json"
    done = run("--model", "demo", "--concepts", "2", "--repeats", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())

    layers = default_layers(len(load_model("demo").layers))
    assert figures["layers"] == layers and len(layers) == 4
    assert list(figures["cosines"]) == [str(layer) for layer in layers]
    for found in figures["cosines"].values():
        assert found["lowest"] >= 0.9999, found

    seconds, comparisons = figures["seconds"], figures["comparisons"]
    assert all(min(taken) > 0 for taken in seconds.values())
    for size in (1, 8, 16, 32, 64):
        assert len(seconds[f"steering-vectors, sampled, batch {size}"]) == 1
    assert [found["goal"] for found in comparisons if "goal" in found] == [
        "at most 1.10",
        "at most 1.10",
        "at least 2",
        "at least 20",
    ]
    for found in comparisons:
        assert found["case"] in seconds and found["to"] in seconds
        assert f"{found['case']} / {found['to']}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "start at 1"),
        (["--concepts", "0"], "start at 1"),
        (["--model", "no/such/model/here"], "no model folder no/such/model/here"),
    ],
)
@pytest.mark.slow
def test_a_mistaken_argument_is_named_without_a_traceback(arguments, said):
    done = run(*arguments)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_directions_are_compared_with_what_was_planted_and_with_dense_eigh(tmp_path):
    out = tmp_path / "figures.json"
    small = ["--hidden", "512", "--concepts", "12", "--reported", "12", "--dense", "1"]
    done = run(*small, "--repeats", "1", "--json", str(out), module="bench_directions")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["eigenvalues"]["largest_relative_error"] < figures["eigenvalues"]["goal"]
    assert set(methods) <= set(figures["planted"])
    assert figures["planted"]["paired"]["median"] > figures["planted"]["pooled"]["median"]
    assert figures["subspace"]["eigenvalue_error"] < 1e-4
    assert len(figures["quality"]["seconds"]) == 1


@pytest.mark.slow
def test_every_method_is_evaluated_in_folds(tmp_path):
    out = tmp_path / "figures.json"
    small = ["--hidden", "128", "--concepts", "10", "--layers", "2", "--subspace", "4"]
    done = run(*small, "--json", str(out), module="bench_evaluate")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    run_methods = {*figures["together"]["methods"], *figures["subspace"]["methods"]}
    assert run_methods == set(methods)


SMALL = {
    "bench_apollo": ["--hidden", "64", "--memory-hidden", "64", "--repeats", "1"],
    "bench_pretraining": [
        *("--hidden", "64", "--layers", "4", "--tokens", "20000"),
        *("--seeds", "1", "--grid", "2e-3"),
    ],
    "bench_frozen_context": [
        *("--context", "64", "--continuation", "8", "--hidden", "128", "--layers", "4"),
        *("--repeats", "1"),
    ],
    "bench_checkpoint": ["--gigabytes", "0.01", "--repeats", "1"],
    "bench_encodings": ["--megabytes", "1", "--repeats", "1", "--tools"],
}
"""Arguments with which a benchmark takes seconds: its figures mean nothing then."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    def figures(module: str) -> dict:
        out = tmp_path_factory.mktemp(module) / "figures.json"
        done = run(*SMALL[module], "--json", str(out), module=module)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return figures


@pytest.mark.slow
def test_optimizers_are_compared_by_time_state_and_memory(small):
    figures = small("bench_apollo")
    for case in figures["steps"]:
        assert {"AdamW, foreach", "Apollo, rank 64"} <= set(case["seconds"])
        assert case["state_bytes_per_parameter"]["AdamW, foreach"] == pytest.approx(8, abs=0.01)
    assert "Apollo, step in backward" in figures["peaks"]


@pytest.mark.slow
def test_optimizers_pre_train_from_the_same_first_weights(small):
    optimizers = small("bench_pretraining")["optimizers"]
    assert {"AdamW", "Apollo"} <= set(optimizers)


@pytest.mark.slow
def test_a_frozen_context_has_the_loss_of_full_backpropagation(small):
    for family in small("bench_frozen_context")["families"].values():
        losses = {name: case["loss"] for name, case in family["cases"].items()}
        assert losses["frozen"] == pytest.approx(losses["whole"], rel=1e-5)


@pytest.mark.slow
def test_a_sync_writes_the_blocks_that_changed_and_no_more(small):
    figures = small("bench_checkpoint")
    counted = figures["bytes"]
    assert counted["changed"] <= counted["written into shards"] < 0.01 * counted["model"]
    assert len(figures["comparisons"]) == 5


@pytest.mark.slow
def test_every_encoding_gives_back_what_it_was_given(small):
    figures = small("bench_encodings")
    assert len(figures["cases"]) == 48
    for case in figures["cases"]:
        assert 0 < case["ours"]["n_bytes"] < 1_100_000
