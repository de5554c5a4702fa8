"""A server's weights are mapped by this user's other processes, and by nobody else's mistake."""

from __future__ import annotations

import base64
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from amygdala_lib import live
from amygdala_lib.artefacts import repository_root
from amygdala_lib.errors import LiveError
from amygdala_lib.live import cuda_ipc
from amygdala_lib.live.owner import start_time
from amygdala_lib.live.weights import weights_of_module
from amygdala_lib.models import DEMO_FOLDER
from tests.live_server import Server

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
NORM = "model.norm.weight"
CUDA_IN_PARTS = (0, b"\x02c" + bytes(range(64)), 4096, 512, b"/torch_7_8", 3, bytes(64), True)


@pytest.fixture
def runtime(tmp_path):
    return live.private_folder(tmp_path / "runtime")


@pytest.fixture(scope="module")
def server():
    """One process for all tests; each lets it serve what it needs."""
    server = Server()
    yield server
    server.end()


@pytest.fixture
def served(server, model_folder, runtime):
    """A tiny Qwen3 being served; the handle file."""
    yield server.serve(model_folder("qwen3"), runtime / "weights.json")
    server.ask("close")


@torch.no_grad()
def logits(model):
    return model(torch.tensor([IDS])).logits[0].float()


def mappings() -> list[str]:
    """Shared weights that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "amygdala" in line]


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def edit(handle_file, change):
    """Tamper with a handle file, leaving its mode as it is."""
    content = json.loads(handle_file.read_text())
    change(content)
    handle_file.write_text(json.dumps(content))


MODELS = {
    "the bundled hybrid in bfloat16": ("demo", "bfloat16"),
    "the bundled hybrid in float32": ("demo", "float32"),
    "Qwen3": ("qwen3", "float32"),
    "Llama": ("llama", "bfloat16"),
    "GPT-2": ("gpt2", "float32"),
}


@pytest.mark.parametrize(("name", "dtype"), MODELS.values(), ids=list(MODELS))
def test_an_attached_model_is_what_from_pretrained_loads(
    server, model_folder, runtime, name, dtype
):
    folder = DEMO_FOLDER if name == "demo" else model_folder(name)
    handle_file = server.serve(folder, runtime / "weights.json", dtype)
    attached = live.attach(handle_file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    assert torch.equal(logits(attached), logits(loaded))
    assert torch.equal(logits(attached), server.logits(IDS))
    assert type(attached) is type(loaded) and attached.dtype == loaded.dtype
    assert attached.config.to_dict() == loaded.config.to_dict()
    assert attached.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert attached.training == loaded.training
    for kind in ("named_parameters", "named_buffers", "state_dict"):
        theirs, ours = (getattr(model, kind)() for model in (loaded, attached))
        theirs, ours = dict(theirs), dict(ours)
        assert list(ours) == list(theirs)  # tied ones once, or under both names
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype, key
            assert ours[key].requires_grad == tensor.requires_grad
    server.ask("close")


def test_every_parameter_lies_in_the_servers_memory_at_a_cache_line(served):
    attached = live.attach(served)
    (mapped,) = mappings()
    start, end = (int(place, 16) for place in mapped.split()[0].split("-"))
    assert "rw-s" in mapped and "memfd" in mapped
    for parameter in attached.parameters():
        assert start <= parameter.data_ptr() < end and parameter.data_ptr() % 64 == 0
    assert live.weights_of(attached).model == json.loads(served.read_text())["model"]


def test_one_write_is_seen_by_both(server, served):
    attached = live.attach(served)
    before = logits(attached)
    server.ask("fill", name=NORM, value=0.25)
    assert (attached.get_parameter(NORM) == 0.25).all()
    assert torch.equal(logits(attached), server.logits(IDS))
    assert not torch.equal(logits(attached), before)

    with torch.no_grad():
        attached.get_parameter(NORM).fill_(1.0)
    assert server.ask("first_value", name=NORM) == 1.0
    assert torch.equal(server.logits(IDS), before)


def test_a_training_step_on_the_attached_model_trains_what_is_served(server, served):
    attached = live.attach(served)
    ids = torch.tensor([IDS])
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = attached(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(server.logits(IDS), logits(attached))


def test_each_weight_has_a_version_counter_of_its_own(served):
    attached = live.attach(served)
    first, second = list(attached.parameters())[:2]
    product = (second * second).sum()
    with torch.no_grad():
        first.mul_(1.0)
    product.backward()
    product = (second * second).sum()
    with torch.no_grad():
        second.mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nothing_is_left_in_the_client_when_it_lets_go(served):
    live.attach(served)
    gc.collect()
    assert mappings() == []
    before = descriptors()
    attached = live.attach(served)
    assert len(descriptors()) == len(before) + 1 and mappings()
    kept = attached.get_parameter(NORM)
    live.weights_of(attached).close()
    del attached
    gc.collect()
    assert descriptors() == before
    assert mappings() and (kept == kept).all()  # a tensor that is still held stays readable
    del kept
    gc.collect()
    assert mappings() == []


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_ends(model_folder, runtime):
    server = Server()
    descriptors_before = server.ask("descriptors")
    handle_file = server.serve(model_folder("qwen3"), runtime / "weights.json")
    assert stat.S_IMODE(handle_file.stat().st_mode) == 0o600
    attached = live.attach(handle_file)
    server.ask("close")
    assert server.ask("descriptors") == descriptors_before
    assert os.listdir(runtime) == []
    with pytest.raises(LiveError, match="withdrawn or replaced"):
        live.weights_of(attached).check()

    handle_file = server.serve(model_folder("qwen3"), runtime / "weights.json")
    server.end()
    assert os.listdir(runtime) == []
    with pytest.raises(LiveError, match="is not there: is the server running"):
        live.attach(handle_file)


def a_process_that_shares(path) -> int:
    """A fork that shares a small layer and waits; its process id."""
    ready, done = os.pipe()
    if child := os.fork():
        os.close(done)
        assert os.read(ready, 1)
        os.close(ready)
        return child
    model = nn.Linear(3, 2)
    live.export_weights(model, path, model_name="a layer")
    os.write(done, b".")
    while True:
        time.sleep(1)


def test_a_killed_server_is_noticed_and_its_file_is_replaced(server, model_folder, runtime):
    handle_file = runtime / "weights.json"
    pid = a_process_that_shares(handle_file)
    shared = live.open_handles(handle_file)
    shared.check()
    assert shared.alive() and "(alive)" in repr(shared)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while shared.alive() and time.monotonic() < deadline:  # nobody has waited for it: a zombie
        time.sleep(0.01)
    assert not shared.alive() and "(gone)" in repr(shared)
    with pytest.raises(LiveError, match=f"process {pid}.*has ended. Attach again"):
        shared.check()
    os.waitpid(pid, 0)
    assert shared.tensors["weight"].isfinite().all()  # memory stays for as long as someone holds it
    with pytest.raises(LiveError, match="has ended"):
        live.open_handles(handle_file)

    server.serve(model_folder("qwen3"), handle_file)
    with live.open_handles(handle_file) as new:
        assert new.alive() and not shared.alive()
    server.ask("close")


def test_another_process_with_the_same_id_is_not_the_server(served):
    shared = live.open_handles(served)
    edit(served, lambda content: content.update(started=content["started"] + 1))
    with pytest.raises(LiveError, match="another has its id"):
        live.open_handles(served)
    shared.check()  # what is attached already knows whom it is attached to


def test_a_process_that_waits_to_be_collected_has_ended():
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while start_time(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists()
    assert start_time(child.pid) is None
    child.wait()
    assert start_time(os.getpid()) == start_time(os.getpid()) is not None


def test_the_memory_cannot_be_cut_off_under_a_reader(served):
    content = json.loads(served.read_text())
    path = f"/proc/{content['pid']}/fd/{content['memories'][0]['descriptor']}"
    for size in (0, content["memories"][0]["bytes"] * 2):
        with pytest.raises(PermissionError):
            os.truncate(path, size)


def test_a_fork_of_the_server_that_ends_takes_nothing_away(runtime):
    with live.export_weights(nn.Linear(3, 2), runtime / "weights.json", model_name="none") as it:
        if not (child := os.fork()):
            it.close()
            os._exit(0)
        os.waitpid(child, 0)
        with live.open_handles(it.path) as shared:
            assert set(shared.tensors) == {"weight", "bias"}


# What a server shares


def test_parameters_keep_identity_values_layout_and_ties(runtime):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    model[2].weight.data = torch.randn(4, 6).t()
    empty = nn.Parameter(torch.empty(0))
    model.register_parameter("empty", empty)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    strides = {name: value.stride() for name, value in parameters.items()}
    with live.export_weights(model, runtime / "weights.json", model_name="a model") as export:
        after = dict(model.named_parameters(remove_duplicate=False))
        assert all(after[name] is parameter for name, parameter in parameters.items())
        assert {name: value.stride() for name, value in after.items()} == strides
        with live.open_handles(export.path) as shared:
            assert set(shared.tensors) == set(values)
            for name, value in values.items():
                assert torch.equal(shared.tensors[name], value)
                assert torch.equal(model.state_dict()[name], value)
            assert shared.tensors["0.weight"] is shared.tensors["1.weight"]
            assert (shared.model, shared.naming) == ("a model", "transformers")
        sizes = [value.nbytes for name, value in values.items() if name != "1.weight"]
        assert sum(sizes) <= export.n_bytes < sum(sizes) + 64 * len(sizes)


def test_two_parameters_in_one_place_stay_one(runtime):
    model = nn.Module()
    model.first = nn.Parameter(torch.randn(3, 3))
    model.second = nn.Parameter(model.first.data)
    assert model.first is not model.second
    with live.export_weights(model, runtime / "weights.json", model_name="none"):
        model.second.data[0, 0] = 42
        assert model.first[0, 0] == 42


def quantised():
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    return model


def halves():
    model = nn.Module()
    whole = torch.randn(4, 4)
    model.whole, model.part = nn.Parameter(whole), nn.Parameter(whole[2:])
    return model


def three_in_one():
    model = nn.Module()
    whole = torch.randn(16)
    model.whole = nn.Parameter(whole)
    model.first, model.last = nn.Parameter(whole[:2]), nn.Parameter(whole[-2:])
    return model


def a_buffer_over_a_parameter():
    model = nn.Linear(4, 4)
    model.register_buffer("packed", model.weight.data.view(-1))
    return model


def larger_than_any_memory():
    model = nn.Linear(2, 2)
    model.huge = nn.Parameter(torch.zeros(1).expand(1 << 44))
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (quantised, r"weight is int8, quantised(.|\n)*scale is float8_e4m3fn, quantised"),
        (halves, "whole and part share a part of their memory"),
        (three_in_one, r"whole share a part(.|\n)*whole and last share a part"),
        (a_buffer_over_a_parameter, "share a part of their memory"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.ReLU, "it has no parameters"),
        (larger_than_any_memory, r"sharing 70368\.\d+ GB of weights takes .* are free"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_in_place_is_refused_and_not_touched(runtime, make, said):
    model = make()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(LiveError, match=said):
        live.export_weights(model, runtime / "weights.json", model_name="none")
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert os.listdir(runtime) == []


def test_one_file_is_of_one_model_and_one_model_of_one_file(server, served):
    with pytest.raises(LiveError, match=f"in use by process {server.pid}"):
        live.export_weights(nn.Linear(2, 2), served, model_name="another")
    model = nn.Linear(2, 2)
    with live.export_weights(model, served.parent / "mine.json", model_name="mine"):
        with pytest.raises(LiveError, match="shared already, as .*mine.json"):
            live.export_weights(model, served.parent / "again.json", model_name="mine")
        with pytest.raises(LiveError, match=f"in use by process {os.getpid()}"):
            live.export_weights(nn.Linear(2, 2), served.parent / "mine.json", model_name="mine")
    live.export_weights(model, served.parent / "again.json", model_name="mine").close()
    assert os.listdir(served.parent) == ["weights.json"]


def test_a_model_is_shared_for_as_long_as_it_lives(runtime):
    model = nn.Linear(2, 2)
    live.export_weights(model, runtime / "weights.json", model_name="none")
    gc.collect()
    live.open_handles(runtime / "weights.json").close()
    before = len(descriptors())
    del model
    gc.collect()
    assert os.listdir(runtime) == [] and len(descriptors()) == before - 1


@pytest.mark.slow
def test_the_benchmark_of_attaching_compares_the_same_model(tmp_path):
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_attach", "--size", "0.07", "--repeats", "1"]
        + ["--json", str(figures)],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    (attached,), (loaded,) = found["runs"]["attach"], found["runs"]["from_pretrained"]
    assert attached["digest"] == loaded["digest"]
    assert attached["unique after"] < 0.05 * found["shared"]["bytes"]
    for name in found["ratios"]:
        assert name in done.stdout


def test_a_model_that_is_not_attached_is_told_so(loaded):
    with pytest.raises(LiveError, match="is not attached to a server"):
        live.weights_of(loaded("qwen3").model)


def test_a_model_whose_folder_is_gone_or_is_another_is_refused(served, model_folder):
    edit(served, lambda content: content.update(model="/no/such/folder"))
    with pytest.raises(LiveError, match="/no/such/folder has no config.json"):
        live.attach(served)
    edit(served, lambda content: content.update(model=str(model_folder("bert"))))
    with pytest.raises(LiveError):
        live.attach(served)
    edit(served, lambda content: content.update(model=str(model_folder("llama"))))
    with pytest.raises(LiveError, match=r"q_norm.weight \[16\] is served and not used"):
        live.attach(served)
    assert mappings() == []


# Who may share


def test_a_private_folder_is_made_and_kept_private(tmp_path):
    folder = live.private_folder(tmp_path / "some" / "where")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert live.private_folder(folder) == folder
    folder.chmod(0o750)
    with pytest.raises(LiveError, match=r"open to others \(mode 750\): `chmod 700`"):
        live.private_folder(folder)
    with pytest.raises(LiveError, match="open to others"):
        live.export_weights(nn.Linear(2, 2), folder / "weights.json", model_name="none")
    assert os.listdir(folder) == []
    (tmp_path / "link").symlink_to(tmp_path / "some")
    with pytest.raises(LiveError, match="is a symbolic link"):
        live.private_folder(tmp_path / "link")
    (tmp_path / "file").touch(0o600)
    for path in (tmp_path / "file", tmp_path / "file" / "within", tmp_path / "file" / "a" / "b"):
        with pytest.raises(LiveError, match="is a file"):
            live.private_folder(path)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o640, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused(served, mode):
    served.chmod(mode)
    with pytest.raises(LiveError, match=f"mode {mode:o}.*`chmod 600`"):
        live.open_handles(served)
    assert mappings() == []


def test_a_folder_that_others_can_write_to_is_refused(served):
    served.parent.chmod(0o770)
    with pytest.raises(LiveError, match="open to others"):
        live.open_handles(served)


def test_links_pipes_and_folders_are_no_handle_files(served, tmp_path):
    (served.parent / "link.json").symlink_to(served)
    os.mkfifo(served.parent / "pipe.json", 0o600)
    live.private_folder(served.parent / "folder.json")
    for name, said in {
        "link.json": "is a symbolic link",
        "pipe.json": "is no regular file",
        "folder.json": "is no regular file",
    }.items():
        with pytest.raises(LiveError, match=said):
            live.open_handles(served.parent / name)
    for name in os.listdir(served.parent):
        if name.endswith(".json") and name != "weights.json":
            path = served.parent / name
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_file_or_folder_is_refused(served):
    for path in (served, served.parent):
        os.chown(path, 12345, -1)
        with pytest.raises(LiveError, match="belongs to user 12345, not 0"):
            live.open_handles(served)
        os.chown(path, 0, -1)
    live.open_handles(served).close()


# What a handle file may say


def first(content):
    return content["tensors"][0]


def other(content):
    """Another tensor than the first, of two dimensions."""
    return next(t for t in content["tensors"][1:] if len(t["shape"]) == 2)


def end_of(content):
    return content["memories"][0]["bytes"]


TAMPERED = {
    "ends beyond the memory": (
        lambda c: first(c).update(offset=end_of(c) - 64),
        "it ends at byte .* of a memory of",
    ),
    "begins beyond the memory": (
        lambda c: first(c).update(offset=end_of(c) * 8),
        "it ends at byte",
    ),
    "a negative offset": (lambda c: first(c).update(offset=-64), "its offset is -64"),
    "an offset between elements": (lambda c: first(c).update(offset=2), "no multiple of 4"),
    "a fraction": (lambda c: first(c).update(offset=64.5), "its offset is 64.5"),
    "true for one": (lambda c: first(c).update(memory=True), "memory True of 1"),
    "a memory that is not there": (lambda c: first(c).update(memory=1), "in memory 1 of 1"),
    "rows that overlap": (
        lambda c: other(c).update(stride=[1, 1]),
        r"overlap with strides \[1, 1\]",
    ),
    "one element everywhere": (
        lambda c: other(c).update(stride=[0, 0]),
        r"overlap with strides \[0, 0\]",
    ),
    "a negative stride": (lambda c: other(c).update(stride=[-64, 1]), "its stride is not"),
    "a negative shape": (lambda c: other(c).update(shape=[-1, 4]), "its shape is not"),
    "more elements than there are": (
        lambda c: other(c).update(shape=[1 << 40, 1 << 20], stride=[1 << 20, 1]),
        "it ends at byte 4,611,",
    ),
    "numbers beyond all": (lambda c: other(c).update(shape=[1 << 70, 1]), "its shape is not"),
    "many dimensions": (
        lambda c: first(c).update(shape=[1] * 64, stride=[1] * 64),
        "its shape has 64 dimensions",
    ),
    "fewer strides": (lambda c: other(c).update(stride=[1]), "2 dimensions have 1 strides"),
    "the place of another": (
        lambda c: other(c).update(offset=first(c)["offset"]),
        "'.*' and '.*' overlap",
    ),
    "a name twice": (
        lambda c: other(c).update(names=first(c)["names"]),
        "the name '.*' is taken",
    ),
    "no names": (lambda c: first(c).update(names=[]), "has no names"),
    "a strange dtype": (lambda c: first(c).update(dtype="int8"), "its dtype is 'int8'"),
    "an attribute of torch": (lambda c: first(c).update(dtype="load"), "its dtype is 'load'"),
    "no tensors": (lambda c: c.update(tensors=[]), "tensors is not a list"),
    "a tensor that is none": (lambda c: c["tensors"].append("x"), "tensor .*: not an object"),
    "no memories": (lambda c: c.update(memories=None), "memories is not a list"),
    "no size": (lambda c: c.update(memories=[{}]), "memory 0 says no size"),
    "a larger memory": (
        lambda c: c["memories"][0].update(bytes=end_of(c) * 2),
        "is not the memory that the handle file was written of",
    ),
    "another memory": (
        lambda c: c["memories"][0].update(inode=1),
        "is not the memory that the handle file was written of",
    ),
    "another file": (
        lambda c: c["memories"][0].update(descriptor=0),
        "is not the memory|cannot be opened",
    ),
    "a file that is not open": (
        lambda c: c["memories"][0].update(descriptor=9999),
        "cannot be opened",
    ),
    "a way out of the folder": (
        lambda c: c["memories"][0].update(descriptor="../../etc/passwd"),
        "its descriptor is '../../etc/passwd', not a whole number",
    ),
    "another format": (lambda c: c.update(format=2), "has format 2; this version reads 1"),
    "another transport": (lambda c: c.update(transport="pickle"), "transport is 'pickle'"),
    "other names": (lambda c: c.update(naming=["vllm"]), r"naming is \['vllm'\]"),
    "no process": (lambda c: c.update(pid=-1), "pid is -1"),
    "a model that is no text": (lambda c: c.update(model=7), "model is 7"),
    "a transport that needs more": (
        lambda c: c.update(transport="cuda_ipc"),
        "its handle is not base64",
    ),
}


@pytest.mark.parametrize(("change", "said"), TAMPERED.values(), ids=list(TAMPERED))
def test_a_handle_file_that_was_tampered_with_maps_nothing(served, change, said):
    before = descriptors()
    edit(served, change)
    with pytest.raises(LiveError, match=said):
        live.open_handles(served)
    assert mappings() == [] and descriptors() == before


def test_everything_wrong_with_a_handle_file_is_said_at_once(served):
    def change(content):
        first(content).update(offset=-1, dtype="int4")
        other(content).update(stride=[0, 0])

    edit(served, change)
    with pytest.raises(LiveError) as error:
        live.open_handles(served)
    for said in ("its offset is -1", "its dtype is 'int4'", "overlap with strides"):
        assert said in str(error.value)
    edit(served, lambda c: [tensor.update(offset=-1) for tensor in c["tensors"]])
    with pytest.raises(LiveError, match=r"\(and \d+ more\)"):
        live.open_handles(served)


def test_a_damaged_handle_file_is_refused_at_any_length(served):
    content = served.read_bytes()
    for length in range(0, len(content) - 2, len(content) // 40):
        served.write_bytes(content[:length])
        with pytest.raises(LiveError, match="is damaged"):
            live.open_handles(served)
    for other_content, said in {
        b"[1]": "holds a list",
        b"[" * 100_000: "is damaged",
        b"\xff\xfe": "is damaged",
        b"{}": "has format None",
    }.items():
        served.write_bytes(other_content)
        with pytest.raises(LiveError, match=said):
            live.open_handles(served)
    served.write_bytes(b"")
    os.truncate(served, 65 << 20)  # sparse
    with pytest.raises(LiveError, match="longer than 67,108,864 bytes"):
        live.open_handles(served)


# CUDA


def test_cuda_handles_survive_json():
    memory = json.loads(json.dumps(cuda_ipc.to_memory(CUDA_IN_PARTS, "GPU-1234")))
    assert cuda_ipc.check_memory(memory) == []
    assert memory["device"] == "GPU-1234"
    # What torch exports and what it opens are the same eight things, the device's number aside.
    assert cuda_ipc.from_memory(memory, 5) == (5, *CUDA_IN_PARTS[1:])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("handle", "not base64!", "its handle is not base64"),
        ("handle", None, "its handle is not base64"),
        ("handle", "", "its handle has 0 bytes"),
        ("handle", base64.b64encode(bytes(5000)).decode(), "its handle has 5,000 bytes"),
        ("handle", base64.b64encode(b"\x02e" + bytes(80)).decode(), "expandable segment"),
        ("counter", 7, "its counter is not base64"),
        ("event", "====", "its event is not base64"),
        ("offset", -1, "its offset is -1"),
        ("counter_offset", "3", "its counter_offset is '3'"),
        ("counter_offset", 10_000, "its counter_offset is 10000"),
        ("device", 0, "its device is 0, not a UUID"),
        ("event_required", 1, "its event_required is 1"),
    ],
)
def test_a_cuda_handle_that_was_tampered_with_is_refused(field, value, said):
    memory = cuda_ipc.to_memory(CUDA_IN_PARTS, "GPU-1234") | {field: value}
    (problem,) = cuda_ipc.check_memory(memory)
    assert said in problem


def test_cuda_memory_that_cannot_be_shared_is_named():
    """The allocator's own report says which it is; here as it would look."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(256)) for name in "abcd"})
    weights = weights_of_module(model)
    plain, expandable, pool, foreign = (
        {
            "device": 0,
            "address": weight.tensor.data_ptr() - 64,
            "total_size": weight.tensor.nbytes + 128,
            "is_expandable": False,
            "segment_pool_id": (0, 0),
        }
        for weight in weights
    )
    expandable["is_expandable"] = True
    pool["segment_pool_id"] = (0, 1)
    foreign["device"] = 1
    problems = cuda_ipc.unshareable(weights, [plain, expandable, pool, foreign])
    assert [problem.split()[0] for problem in problems] == ["b", "c", "d"]
    assert "without expandable_segments" in problems[0]
    assert "without --enable-sleep-mode" in problems[1]
    assert "allocator" in problems[2]


NO_GPU = "CUDA memory is shared between processes by a GPU's driver: there is no GPU here"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_on_a_gpu_one_write_is_seen_by_both_and_nothing_is_copied(model_folder, runtime):
    server = Server()
    try:
        folder = model_folder("qwen3")
        handle_file = runtime / "weights.json"
        server.ask(
            "serve", folder=str(folder), path=str(handle_file), dtype="bfloat16", device="cuda"
        )
        content = json.loads(handle_file.read_text())
        assert content["transport"] == "cuda_ipc"
        held = torch.cuda.memory_allocated()
        attached, again = live.attach(handle_file), live.attach(handle_file)
        assert torch.cuda.memory_allocated() - held < 1 << 20
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
        ids = torch.tensor([IDS], device="cuda")
        with torch.no_grad():
            assert torch.equal(attached(ids).logits, loaded(ids).logits)
            attached.get_parameter(NORM).fill_(0.25)
        torch.cuda.synchronize()
        assert server.ask("first_value", name=NORM) == 0.25
        live.weights_of(attached).close()
        del attached
        gc.collect()
        server.ask("fill", name=NORM, value=0.5)
        assert (again.get_parameter(NORM) == 0.5).all()  # one reader's end is not another's
    finally:
        server.end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_on_a_gpu_the_process_that_serves_cannot_attach_to_itself(runtime):
    model = nn.Linear(64, 64, device="cuda")
    live.export_weights(model, runtime / "weights.json", model_name="none")
    with pytest.raises(LiveError, match="attach in another one"):
        live.open_handles(runtime / "weights.json")
