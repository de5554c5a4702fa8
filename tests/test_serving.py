"""`amygdala serve`: which command it builds, and what it refuses before anything is started."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import amygdala_lib
from amygdala_lib import artefacts
from amygdala_lib.artefacts import repository_root
from amygdala_lib.cli import main, serving
from amygdala_lib.errors import LiveError
from amygdala_lib.live import private_folder

DEMO = Path(amygdala_lib.__file__).parent / "demo" / "model"
COPY = repository_root() / "runs" / "served" / "demo"


@pytest.fixture(autouse=True)
def an_interpreter(monkeypatch):
    """vLLM need not be installed to see which command would start it."""
    monkeypatch.setattr(serving, "_python", lambda: "/env/.venv-vllm/bin/python")


@pytest.fixture
def readout(tmp_path):
    (tmp_path / "readout").mkdir()
    (tmp_path / "readout" / "readout.json").write_text("{}")
    return tmp_path / "readout"


def printed(capsys, *options) -> list[str]:
    assert main(["serve", *options]) == 0
    return capsys.readouterr().out.split()


def refused(capsys, *options) -> str:
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


def test_print_only_prints(capsys, tmp_path, readout):
    runtime = tmp_path / "runtime"
    told = printed(
        capsys,
        *("demo", "--print", "--readout", str(readout), "--port", "8123"),
        *("--runtime", str(runtime), "--checkpoint-after", "60", "--", "--max-model-len", "512"),
    )
    assert told[0] == "env" and f"AMYGDALA_RUNTIME={runtime}" in told
    assert {"VLLM_PLUGINS=amygdala,amygdala_http", "VLLM_USE_V2_MODEL_RUNNER=0"} <= set(told)
    assert f"AMYGDALA_READOUT={readout}" in told and "AMYGDALA_CHECKPOINT_AFTER=60.0" in told
    command = told[told.index("-m") :]
    assert command == [
        *("-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(COPY)),
        *("--host", "127.0.0.1", "--port", "8123", "--dtype", "bfloat16"),
        *("--enforce-eager", "--max-model-len", "512"),
    ]
    assert not runtime.exists()


def test_a_unix_socket_in_place_of_a_port(capsys, tmp_path):
    told = printed(capsys, "demo", "--print", "--uds", str(tmp_path / "s"))
    assert "--uds" in told and "--port" not in told


def test_weights_are_served_in_the_dtype_they_are_kept_in(capsys, model_folder):
    folder = str(model_folder("qwen3"))
    told = printed(capsys, folder, "--print")
    assert told[told.index("--dtype") + 1] == "float32"
    for option in (["--dtype", "bfloat16"], ["--dtype=auto"]):
        assert "could not be written back" in refused(capsys, folder, "--print", "--", *option)
    assert printed(capsys, folder, "--print", "--", "--dtype=float32").count("--dtype") == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_reach_it_only_if_that_is_meant(capsys, host):
    assert "--allow-remote" in refused(capsys, "demo", "--print", "--host", host)
    assert host in printed(capsys, "demo", "--print", "--host", host, "--allow-remote")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_is_this_machine(capsys, host):
    assert host in printed(capsys, "demo", "--print", "--host", host)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantization", "fp8"], "bfloat16"),
        (["-q", "awq"], "bfloat16"),
        (["--enable-sleep-mode"], "moves weights"),
        (["--enable_lora"], "LoRA"),
        (["--tensor-parallel-size", "2"], "spread"),
        (["-tp=2"], "spread"),
        (["--api-server-count=4"], "steer for itself"),
        (["--speculative-config", "{}"], "draft"),
        (["--port", "1"], "before the --"),
    ],
)
def test_options_that_do_not_go_with_training_are_refused(capsys, options, said):
    assert said in refused(capsys, "demo", "--print", "--", *options)


@pytest.mark.parametrize("option", ["--no-enforce-eager", "-O3", "--compilation-config={}"])
def test_hooks_need_eager_execution(capsys, readout, option):
    told = refused(capsys, "demo", "--print", "--readout", str(readout), "--", option)
    assert "leave out --readout" in told


def test_one_process_of_each_is_no_parallelism(capsys):
    options = ["--tensor-parallel-size", "1", "-dp=1", "--enforce-eager"]
    assert printed(capsys, "demo", "--print", "--", *options).count("--enforce-eager") == 1


def test_quantised_models_are_refused_and_all_problems_are_named(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"text_config": {"quantization_config": {"quant_method": "gptq"}}}
    (folder / "config.json").write_text(json.dumps(config))
    told = refused(
        capsys,
        *(str(folder), "--host", "0.0.0.0", "--readout", str(tmp_path)),
        *("--checkpoint-after", "-1", "--", "--enable-sleep-mode"),
    )
    said = ("gptq", "--allow-remote", "readout.json", "--checkpoint-after", "sleep")
    assert all(each in told for each in said)


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(serving, "_OWN_ENVIRONMENT", Path("not-there"))
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LiveError, match="make vllm.*pip install"):
        serving._python()


# What is started


@pytest.fixture
def starting(monkeypatch, tmp_path):
    """In place of vLLM, a program that waits; what is started and how it ends is real."""
    monkeypatch.setattr(artefacts, "repository_root", lambda: tmp_path)

    def start(program: str) -> None:
        monkeypatch.setattr(serving, "_command", lambda *_: [sys.executable, "-c", program])

    return start


def test_the_token_is_new_and_its_folder_private(capsys, starting, tmp_path):
    starting("import os; print(os.environ['AMYGDALA_RUNTIME'])")
    runtime, tokens = tmp_path / "runtime", set()
    for _ in range(2):
        assert main(["serve", "demo", "--runtime", str(runtime)]) == 0
        token = (runtime / "token").read_text().strip()
        assert f"token:   {token}\n" in capsys.readouterr().out and len(token) > 40
        tokens.add(token)
    assert len(tokens) == 2
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert stat.S_IMODE((runtime / "token").stat().st_mode) == 0o600


def test_the_bundled_model_is_served_from_a_copy_that_is_kept(starting, tmp_path):
    starting("")
    assert main(["serve", "demo", "--runtime", str(tmp_path / "runtime")]) == 0
    copy = tmp_path / "runs" / "served" / "demo"
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
    (copy / "config.json").write_bytes(b"trained")
    assert main(["serve", "demo", "--runtime", str(tmp_path / "runtime")]) == 0
    assert (copy / "config.json").read_bytes() == b"trained"
    assert [path.name for path in copy.parent.iterdir()] == ["demo"]


def test_a_folder_of_its_own_is_gone_afterwards(capsys, starting, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    starting("import sys; sys.exit(3)")
    assert main(["serve", "demo"]) == 3
    told = capsys.readouterr().out
    folder = next(x for x in told.splitlines() if x.startswith("folder:")).split()[1]
    assert not Path(folder).exists()


def test_a_folder_that_others_can_enter_is_refused(capsys, starting, tmp_path):
    starting("raise SystemExit")
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    assert "open to others" in refused(capsys, "demo", "--runtime", str(tmp_path / "open"))


WAITS = """
import signal, sys, time
from pathlib import Path
ends = Path(sys.argv[1])
def end(*_):
    ends.write_text("in order")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
ends.with_name("started").touch()
time.sleep(60)
"""


@pytest.mark.slow  # each imports the library anew
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_in_order_with_what_started_it(tmp_path, number):
    private_folder(tmp_path / "runtime")
    program = (
        "import os, sys\nfrom amygdala_lib.cli import serving\n"
        f"serving._run([sys.executable, '-c', {WAITS!r}, {str(tmp_path / 'ends')!r}], "
        "dict(os.environ))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (child,) = psutil.Process(process.pid).children()
        assert os.getpgid(child.pid) == child.pid, "a terminal's interrupt does not reach it"
        process.send_signal(number)
        process.wait(20)
        _, alive = psutil.wait_procs([child], timeout=20)
        assert not alive and (tmp_path / "ends").read_text() == "in order"
    finally:
        process.kill()
        process.wait()
