"""The `amygdala` command, as a person types it."""

import html
import json
import shutil
import subprocess
import sys

import pytest

from amygdala_lib import Directions, Evaluation, QualityReport, artefacts, doctor
from amygdala_lib.cli import main
from amygdala_lib.notebook_sources import ROOT


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["corpus", "check", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    assert "usage: amygdala" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "99"], "No notebook matches 99. There are: 00_start_here"),
        (["run", "-p", "no_such", "1"], "no notebook here takes a parameter `no_such`"),
        (["run", "-p", "run", "x"], "say `--run NAME`"),
        (["run", "-p", "run", "x", "-p", "run", "y"], "-p is given twice for run"),
        (["run", "--run", "../away"], "'../away' cannot name a run"),
        (["extract", "--run", "../away"], "'../away' cannot name a run"),
        (["quality", "--run", "../away"], "'../away' cannot name a run"),
        (["run", "--from", "99"], "No notebook matches 99"),
    ],
)
def test_errors_are_one_message_and_status_2(command, said, capsys):
    assert main(command) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err
    assert printed.out == ""


def test_the_installed_command_is_this_one(tmp_path):
    """From a folder that is not the repository, in a process of its own."""
    command = [sys.executable, "-m", "amygdala_lib.cli", "run", "99"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "00_start_here" in done.stderr


def test_corpus_check(tmp_path, capsys):
    assert main(["corpus", "check"]) == 0
    assert str(ROOT / "corpus") in capsys.readouterr().out

    broken = tmp_path / "corpus"
    shutil.copytree(ROOT / "corpus", broken)
    (broken / "direct" / "no_such_concept.txt").write_text("I feel odd.\n")
    assert main(["corpus", "check", str(broken)]) == 1
    assert "no_such_concept" in capsys.readouterr().out
    assert main(["corpus", "check", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().out


def test_doctor_finds_this_machine_well(capsys):
    """The tests need what the notebooks need, so nothing may fail here."""
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for subject in ("python", "packages", "torch and device", "bundled model", "corpus"):
        assert any(line.startswith(("ok", "warn")) and subject in line for line in lines), subject


def test_doctor_json_and_status_of_a_sick_machine(tmp_path, monkeypatch, capsys):
    """A checkout without a corpus, whose lock asks for what is not installed."""
    (tmp_path / "requirements.lock").write_text("# a remark\nno-such-package==1.0\nnumpy==0.1\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["packages"]["status"] == "fail"
    assert "no-such-package==1.0" in found["packages"]["detail"]
    assert found["packages"]["fix"] == doctor.INSTALL
    assert found["corpus"]["status"] == "fail" and "corpus check" in found["corpus"]["fix"]
    assert found["python"] == {
        "subject": "python", "status": "ok", "detail": found["python"]["detail"], "fix": ""
    }  # fmt: skip
    for finding in report["findings"]:
        assert bool(finding["fix"]) == (finding["status"] != "ok")


def test_a_package_of_another_version_is_a_warning(tmp_path, monkeypatch):
    lock = "numpy==0.1\nno-such==1 ; sys_platform == 'win32'\n"
    (tmp_path / "requirements.lock").write_text(lock)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    finding = doctor.check_packages()
    assert finding.status == "warn" and "numpy" in finding.detail and "==0.1" in finding.detail


def test_runs_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file where the folder should be")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    finding = doctor.check_runs()
    assert finding.status == "fail" and finding.fix


def test_a_check_that_breaks_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)  # no requirements.lock at all
    finding = next(f for f in doctor.examine() if f.subject == "packages")
    assert finding.status == "fail" and "requirements.lock" in finding.detail


# Extraction and quality


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A place for runs/ of this test's own."""
    monkeypatch.setattr(artefacts, "repository_root", lambda: tmp_path)
    return tmp_path / "runs"


def test_extract_then_quality_leave_the_artefacts_of_the_notebooks(
    runs, model_folder, corpus_folder, capsys
):
    model, texts = str(model_folder("qwen3_5")), str(corpus_folder)
    made = ["extract", "--model", model, "--corpus", texts, "--layers", "1,3", "--run", "mine"]
    assert main([*made, "--pool", "mean"]) == 0
    assert "3 directions by pooled at layers 1, 3" in capsys.readouterr().out
    directions = Directions.load(runs / "mine")
    assert directions.layers == [1, 3] and directions.provenance["pool"] == "mean"

    assert main(["quality", "--run", "mine", "--layer", "3"]) == 0
    said = capsys.readouterr().out
    assert "layer 3 of 5" in said and "clean" in said
    report = QualityReport.load(runs / "mine")
    assert set(report.figures) == set(directions.concepts) and report.layers == [1, 3]


@pytest.mark.parametrize("method", ["subspace", "centred"])
def test_extract_reads_what_the_method_needs(runs, model_folder, corpus_folder, method):
    asked = ["--model", str(model_folder("llama")), "--corpus", str(corpus_folder)]
    assert main(["extract", *asked, "--layers", "2", "--method", method]) == 0
    assert Directions.load(runs / "demo").provenance["method"] == method


def test_an_unknown_method_is_refused_before_anything_is_loaded(runs, capsys):
    assert main(["extract", "--model", "no/such/model", "--method", "poled"]) == 2
    assert "no method 'poled': choose among" in capsys.readouterr().err
    assert not runs.exists()


def test_quality_without_directions_says_what_makes_them(runs, capsys):
    assert main(["quality", "--run", "nothing"]) == 2
    assert "is not there: `amy.extract" in capsys.readouterr().err


def test_validate_writes_figures_and_a_page_that_stands_alone(
    runs, model_folder, corpus_folder, capsys
):
    asked = ["--model", str(model_folder("qwen3_5")), "--corpus", str(corpus_folder)]
    methods = ["--methods", "pooled,centred", "--pool", "mean"]
    assert main(["validate", *asked, *methods, "--run", "mine", "--report"]) == 0
    assert "median AUROC" in capsys.readouterr().out
    found = Evaluation.load(runs / "mine")
    assert set(found.summary.method) == {"pooled", "centred"}
    assert -1 in set(found.summary.layer), "the embeddings stand beside every figure"
    page = (runs / "mine" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert str(found.recommend()) in html.unescape(page)
    assert "src='http" not in page and "<script" not in page


def test_validate_names_methods_that_are_not_there(runs, capsys):
    assert main(["validate", "--methods", "pooled,poled"]) == 2
    assert "no method 'poled': choose among" in capsys.readouterr().err
