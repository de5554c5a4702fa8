"""pyproject.toml, requirements.lock, environment.yml and the Makefile describe one environment."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from amygdala_lib.doctor import INSTALL, INSTALL_NODEPS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = ("linux", "darwin")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and line.lstrip()[0] != "#"]


def pinned(python: str, platform: str) -> dict[str, str]:
    """Versions that the lock gives this interpreter."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[platform],
        "os_name": "posix",
    }
    found = {}
    for requirement in requirements("requirements.lock"):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found, f"{requirement.name} twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found[requirement.name] = pin.version
    return found


def declared() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    # vLLM has an environment of its own: requirements-vllm.txt.
    extras = {name: lines for name, lines in extras.items() if name != "vllm"}
    lists = [PROJECT["project"]["dependencies"], *extras.values()]
    return [Requirement(line) for names in lists for line in names]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_dependency_for_every_python(python, platform):
    versions = pinned(python, platform)
    for requirement in declared():
        assert requirement.name in versions, f"{requirement.name}: run `make lock`"
        assert requirement.specifier.contains(versions[requirement.name]), requirement
    assert versions["torch"] == "2.13.0" and versions["transformers"] == "5.19.0"


def test_the_lock_names_no_registry_and_no_gpu_packages():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    names = {requirement.name for requirement in requirements("requirements.lock")}
    assert not [name for name in names if re.match("nvidia|cuda|triton", name)]


def test_supported_pythons_agree():
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    for minor in range(8, 17):
        assert supported.contains(f"3.{minor}.1") == (f"3.{minor}" in PYTHONS)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (conda,) = [d for d in environment["dependencies"] if str(d).startswith("python ")]
    assert SpecifierSet(conda.removeprefix("python ")) == supported
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()


def test_steering_vectors_stays_off_the_resolver():
    (only,) = requirements("requirements-nodeps.txt")
    assert str(only) == "steering-vectors==0.12.2"
    assert only.name not in {requirement.name for requirement in requirements("requirements.lock")}
    assert INSTALL_NODEPS in (ROOT / "requirements-nodeps.txt").read_text()


def dry_run(target: str, *variables: str) -> str:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    command = [make, "--always-make", "--dry-run", "--directory", str(ROOT), target, *variables]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_make_and_conda_install_the_same():
    steps = [line for line in dry_run("test").splitlines() if " -m pip install " in line]
    assert steps == [f".venv/bin/{INSTALL}", f".venv/bin/{INSTALL_NODEPS}"]

    text = (ROOT / "environment.yml").read_text()
    (pip,) = [d["pip"] for d in yaml.safe_load(text)["dependencies"] if isinstance(d, dict)]
    assert [f"python -m pip install {argument}" for argument in pip] == [INSTALL]
    assert f"#   {INSTALL_NODEPS}\n" in text


def test_ci_runs_what_the_makefile_offers():
    script = (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^make (\S+)$", script, re.MULTILINE)
    assert targets == ["notebooks", "test", "test-slow", "test-vllm", "lint"]
    assert "set -euo pipefail" in script
    for target in targets:
        assert dry_run(target)


@pytest.mark.parametrize("python", ["", "/not/there/python3"])
def test_make_without_a_python_says_what_to_do(tmp_path, python):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    command = [make, "-C", str(ROOT), "notebooks", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.10 to 3.13" in done.stdout and "PYTHON=" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_what_the_readme_imports_and_names_is_there():
    """Every import, and every attribute of the package, in its Python."""
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    tree = ast.parse(source)
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "amy"
    }
    assert used and not [name for name in used if not hasattr(names["amy"], name)]
