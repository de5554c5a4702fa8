"""Is this machine ready? Each finding comes with what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from amygdala_lib.notebook_sources import ROOT

INSTALL = "python -m pip install -r requirements.lock"
INSTALL_NODEPS = "python -m pip install --no-deps -r requirements-nodeps.txt -e ."


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `fix` is empty when the status is `ok`."""

    subject: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.status:4}  {self.subject:16}  {self.detail}"
        return f"{line}\n{'':24}{self.fix}" if self.fix else line


def examine() -> Iterator[Finding]:
    """Yield a finding per subject, cheap ones first; a check that breaks is a finding, too."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_packages,
        check_steering_vectors,
        check_kernel,
        check_memory,
        check_disk,
        check_runs,
        check_corpus,
        check_device,
        check_model,
    ]
    for check in checks:
        try:
            yield check()
        except Exception as error:  # the very thing to find: a broken package breaks its check
            subject = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding(subject, "fail", f"{type(error).__name__}: {error}", INSTALL)


def check_python() -> Finding:
    where = f"Python {platform.python_version()} in {sys.prefix}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", where)
    fix = "use Python 3.10 to 3.13: make notebooks PYTHON=/path/to/python3.12"
    return Finding("python", "fail", where, fix)


def check_packages() -> Finding:
    """Every package of the lock that applies here, at its version."""
    from packaging.requirements import Requirement

    missing, other, right = [], [], 0
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            missing.append(str(wanted).partition(";")[0])
            continue
        if wanted.specifier.contains(found, prereleases=True):
            right += 1
        else:
            other.append(f"{wanted.name} {found} (lock: {wanted.specifier})")
    if missing:
        return Finding("packages", "fail", f"not installed: {', '.join(missing)}", INSTALL)
    if other:
        return Finding("packages", "warn", f"not as locked: {', '.join(other)}", INSTALL)
    return Finding("packages", "ok", f"{right} as in requirements.lock")


def check_steering_vectors() -> Finding:
    try:
        import steering_vectors  # noqa: F401
    except ImportError as error:
        return Finding("steering-vectors", "warn", f"not importable: {error}", INSTALL_NODEPS)
    return Finding("steering-vectors", "ok", version("steering-vectors"))


def check_kernel() -> Finding:
    """The kernel notebooks name, and that it is this very interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = "python -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding("jupyter kernel", "fail", "no kernel is named python3", fix)
    interpreter = spec.argv[0]
    if os.path.isabs(interpreter) and Path(interpreter).parent != Path(sys.executable).parent:
        detail = f"python3 in {spec.resource_dir} starts {interpreter}, not {sys.executable}"
        return Finding("jupyter kernel", "fail", detail, fix)
    return Finding("jupyter kernel", "ok", f"python3 in {spec.resource_dir}")


def check_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if memory.available < 2e9:
        return Finding("memory", "warn", detail, "the notebooks need about 2 GB: close something")
    return Finding("memory", "ok", detail)


def check_disk() -> Finding:
    free = shutil.disk_usage(ROOT).free
    detail = f"{free / 1e9:.1f} GB free at {ROOT}"
    if free < 1e9:
        return Finding("disk", "fail", detail, "make room: old runs stand in runs/")
    return Finding("disk", "ok", detail)


def check_runs() -> Finding:
    folder = ROOT / "runs"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("runs/", "fail", str(error), f"make it yours: chmod u+rwx {folder}")
    return Finding("runs/", "ok", f"{folder} can be written to")


def check_corpus() -> Finding:
    from amygdala_lib.corpus import preflight

    found = preflight(ROOT / "corpus")
    if found.corpus is None:
        detail = f"{len(found.problems)} problems, the first: {found.problems[0]}"
        return Finding("corpus", "fail", detail, "see them all: amygdala corpus check")
    if found.warnings:
        detail = f"{found.corpus.summary()}; {len(found.warnings)} warnings"
        return Finding("corpus", "warn", detail, "see them: amygdala corpus check")
    return Finding("corpus", "ok", found.corpus.summary())


def check_device() -> Finding:
    import torch

    from amygdala_lib.models import choose_device

    _, _, reason = choose_device()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Finding(
        "torch and device",
        "ok",
        f"torch {torch.__version__} ({build}, {torch.get_num_threads()} threads): {reason}",
    )


def check_model() -> Finding:
    """Load the bundled model, which reads all of its files."""
    from amygdala_lib.errors import ModelError
    from amygdala_lib.models import load_model

    try:
        return Finding("bundled model", "ok", str(load_model("demo")))
    except ModelError as error:
        fix = "git checkout -- amygdala_lib/demo/model, or train it anew: make demo-model"
        return Finding("bundled model", "fail", str(error), fix)
