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
