"""A model folder is compared, synced, rolled back and verified byte by byte, and never half."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amygdala_lib import checkpoint
from amygdala_lib.artefacts import repository_root
from amygdala_lib.checkpoint import access, journal, shards, transaction
from amygdala_lib.cli import main
from amygdala_lib.errors import ArtefactError, CheckpointError

QUIET = {"progress": False}
BLOCK = 4096
SMALL_PIECE = 2 * BLOCK
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of two blocks, so that small tensors have many."""
    monkeypatch.setattr(shards, "PIECE", SMALL_PIECE)


@pytest.fixture
def tmp_path():
    """In memory where there is such a folder: a sync waits for the disk a dozen times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def random_bits(dtype, shape, generator):
    """Finite values of any dtype, with as many bits as it has."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(shape, generator=generator)
        return values.to(dtype) if dtype != torch.float8_e8m0fnu else values.abs().to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def new_state(seed=0):
    """Every dtype, in shapes with and without a rest, empty and with no dimension."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"of.{str(dtype).removeprefix('torch.')}": random_bits(dtype, (37, 11), generator)
        for dtype in shards.DTYPES.values()
    }
    return state | {
        "wide": random_bits(torch.bfloat16, (60, 300), generator),
        "deep": random_bits(torch.float32, (7000,), generator),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


def write_folder(folder, state, n_shards=3):
    """A model folder of so many shards, with an index if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    names = sorted(state)
    if n_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for n in range(n_shards):
        shard = f"model-{n + 1:05d}-of-{n_shards:05d}.safetensors"
        held = names[n::n_shards]
        save_file({name: state[name] for name in held}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", new_state())


@pytest.fixture
def changed():
    """The state of `folder` with a few changes."""
    state = new_state()
    state["wide"][3:5] += 1
    state["deep"][6999] = -1
    state["of.int64"][0, 0] += 1
    return state


def contents(folder, bookkeeping=False):
    """Every file's bytes; without `bookkeeping` of the model only."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (bookkeeping or ".amygdala" not in path.parts)
    }


def held(folder):
    """What the safetensors library finds in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(a, b):
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(b[name].contiguous().view(-1).view(torch.uint8))
        for name in a
    )


def refuses(folder, said, call):
    """The call raises CheckpointError, saying all of `said`, and not a byte of the folder moves."""
    before = contents(folder, bookkeeping=True)
    with pytest.raises(CheckpointError) as refused:
        call()
    for part in said:
        assert part in str(refused.value)
    after = contents(folder, bookkeeping=True)
    after.pop(".amygdala/lock", None), before.pop(".amygdala/lock", None)
    assert after == before


# What differs


def test_a_folder_does_not_differ_from_what_was_saved_in_it(folder):
    found = checkpoint.diff(folder, new_state(), **QUIET)
    assert not found and found.total()["changed_bytes"] == 0
    assert set(found.to_frame().index) == set(new_state())
    assert found.total()["bytes"] == sum(t.nbytes for t in new_state().values())
    assert "all" in str(found) and "are the same" in str(found)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(data=st.data())
def test_bytes_blocks_elements_and_the_largest_change_are_counted(tmp_path, data):
    """Against counting over whole tensors in plain numpy and float64."""
    folder = tmp_path / "counted"
    old = new_state()
    if not folder.exists():
        write_folder(folder, old)
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(new)), max_size=4, unique=True)):
        bits = new[name].view(-1).view(torch.uint8).numpy()
        for place in data.draw(st.lists(st.integers(0, max(0, len(bits) - 1)), max_size=6)):
            if len(bits):
                bits[place] ^= data.draw(st.integers(1, 255)) if name != "of.bool" else 1
    frame = checkpoint.diff(folder, new, **QUIET).to_frame()
    for name, row in frame.iterrows():
        before, after = (t[name].view(-1).view(torch.uint8).numpy() for t in (old, new))
        differs = before != after
        itemsize = old[name].element_size()
        assert row["changed_bytes"] == differs.sum()
        assert row["changed_elements"] == differs.reshape(-1, itemsize).any(1).sum()
        assert row["changed_blocks"] == sum(
            differs[n : n + BLOCK].any() for n in range(0, len(differs), BLOCK)
        )
        assert (row["blocks"], row["elements"]) == (
            -(-len(before) // BLOCK),
            old[name].numel(),
        )
        if differs.any() and old[name].dtype.is_floating_point:
            expected = (new[name].double() - old[name].double()).abs().max().item()
            if np.isfinite(expected):
                assert row["largest_change"] == pytest.approx(expected, rel=1e-6)
            else:
                assert row["largest_change"] == np.inf
        elif differs.any():
            assert np.isnan(row["largest_change"])
        else:
            assert row["largest_change"] == 0


def test_a_change_of_sign_of_zero_is_a_change_and_nan_is_equal_to_itself(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": torch.tensor([0.0, torch.nan, 1.0])}, 1)
    same_bits = {"a": torch.tensor([0.0, torch.nan, 1.0])}
    assert not checkpoint.diff(folder, same_bits, **QUIET)
    found = checkpoint.diff(folder, {"a": torch.tensor([-0.0, torch.nan, 1.0])}, **QUIET)
    assert found.total()["changed_elements"] == 1 and found.total()["largest_change"] == 0


def test_views_of_any_stride_are_compared_as_they_read(folder):
    """Merged tensors arrive as row slices, transposed ones as views."""
    state = new_state()
    merged = torch.cat([torch.ones(5, 300, dtype=torch.bfloat16), state["wide"]])
    strided = torch.stack([state["deep"], state["deep"]], dim=1)
    for view in (
        merged[5:],
        state["wide"].T.contiguous().T,
        state["wide"][None].expand(1, 60, 300)[0],
    ):
        assert not checkpoint.diff(folder, state | {"wide": view, "deep": strided[:, 1]}, **QUIET)
    wrong = state["wide"].T.contiguous()
    wrong[7, 50] += 1
    found = checkpoint.diff(folder, state | {"wide": wrong.T}, **QUIET)
    assert found.total()["changed_elements"] == 1


def test_a_folder_is_compared_with_another_however_they_are_cut(folder, changed, tmp_path):
    other = write_folder(tmp_path / "other", changed, n_shards=2)
    single = write_folder(tmp_path / "single", changed, n_shards=1)
    by_tensors = checkpoint.diff(folder, changed, **QUIET).to_frame()
    for state in (other, str(single), single / "model.safetensors"):
        assert checkpoint.diff(folder, state, **QUIET).to_frame().equals(by_tensors)


def test_names_are_mapped_and_what_maps_to_none_is_left_out(folder):
    state = {f"server.{name}": tensor for name, tensor in new_state().items()}
    state["rotary"] = torch.ones(3)

    def names(name):
        return name.removeprefix("server.") if name.startswith("server.") else None

    assert not checkpoint.diff(folder, state, names=names, **QUIET)


def test_a_partial_state_leaves_the_rest_as_it_is(folder):
    before = held(folder)
    part = {"deep": before["deep"] + 1}
    nothing = checkpoint.diff(folder, {}, partial=True, **QUIET)
    assert not nothing and nothing.total()["bytes"] == 0 and "are the same" in str(nothing)
    refuses(
        folder, ["missing from the state", "partial=True"], lambda: checkpoint.sync(folder, part)
    )
    checkpoint.sync(folder, part, partial=True, **QUIET)
    assert same(held(folder), before | part)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "gpt2", "gpt_neox"])
def test_a_model_fits_the_folder_it_was_loaded_from(model_folder, family, tmp_path):
    """The folder has tied embeddings once, NeoX's other names, and Qwen3-Next's experts apart."""
    folder = shutil.copytree(model_folder(family), tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not checkpoint.diff(folder, model, **QUIET)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[3] += 1
    found = checkpoint.diff(folder, model, **QUIET).total()
    assert found["changed_elements"] == embedding.shape[1]


# Sync


def test_sync_makes_the_folder_hold_the_state_and_writes_only_what_changed(folder, changed):
    before, times = contents(folder), {p: p.stat().st_mtime_ns for p in folder.glob("*")}
    change = checkpoint.sync(folder, changed, **QUIET)
    assert same(held(folder), changed)
    total = change.difference.total()
    assert 0 < total["changed_bytes"] <= change.shard_bytes <= total["changed_blocks"] * BLOCK
    expected = checkpoint.diff(write_folder(folder.parent / "old", new_state()), changed, **QUIET)
    assert expected.to_frame().equals(change.difference.to_frame())
    after = contents(folder)
    assert after.keys() == before.keys()
    for name in before:
        touched = before[name] != after[name]
        assert touched == ((folder / name).stat().st_mtime_ns != times[folder / name])
    assert sum(before[name] != after[name] for name in before) in (2, 3)


def test_blocks_that_do_not_change_are_not_written(tmp_path, monkeypatch):
    """One element in one block of eight: so many bytes go to the shard, and no more."""
    state = {"a": torch.zeros(8 * BLOCK // 4)}
    folder = write_folder(tmp_path / "m", state, 1)
    written = []
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.safetensors"):
            written.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    state["a"][3 * BLOCK // 4] = 1
    assert checkpoint.sync(folder, state, **QUIET).shard_bytes == BLOCK
    assert written == [BLOCK]


def test_a_second_sync_has_nothing_to_do(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    before = contents(folder, bookkeeping=True)
    again = checkpoint.sync(folder, changed, **QUIET)
    assert again.id is None and again.shard_bytes == 0 and "nothing to write" in str(again)
    assert contents(folder, bookkeeping=True) == before


def test_what_was_done_is_recorded(folder, changed):
    change = checkpoint.sync(folder, changed, job="night 12", loss=0.25, **QUIET)
    states = checkpoint.history(folder, **QUIET)
    assert list(states.index) == [0, 1] and list(states["action"]) == ["start", "sync"]
    row = states.loc[1]
    assert row["facts"] == {"job": "night 12", "loss": 0.25}
    assert (row["parent"], row["hash"]) == (change.parent, change.hash) and change.id == 1
    assert states.loc[0, "hash"] == change.parent != change.hash
    assert row["changed_bytes"] == change.difference.total()["changed_bytes"]
    assert row["bytes"] == change.delta_bytes and row["time"].endswith("+00:00")
    frame = change.to_frame()
    assert set(frame.index[frame["delta_bytes"] > 0]) == {"wide", "deep", "of.int64"}
    assert set(" ".join(frame["encoding"]).split()) <= {"blocks", "elements", "whole"}
    assert "sync 1" in str(change) and "wide" in str(change)


def test_a_fact_that_json_cannot_hold_is_refused_before_anything_else(folder, changed):
    with pytest.raises(ArtefactError):
        checkpoint.sync(folder, changed, job=torch.ones(1), **QUIET)
    assert not (folder / ".amygdala").exists()


def test_bookkeeping_is_for_its_owner_only(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    kept = folder / ".amygdala"
    for path in (kept, *kept.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize(("keep", "left"), [({"keep": 2}, [3, 4, 5]), ({"keep": None}, range(6))])
def test_the_newest_changes_are_kept(folder, keep, left):
    state = new_state()
    for _ in range(5):
        state["deep"] += 1
        checkpoint.sync(folder, state, **keep, **QUIET)
    assert list(checkpoint.history(folder, **QUIET).index) == list(left)


def test_history_stays_within_its_bytes(folder):
    state = new_state()
    sizes = []
    for _ in range(4):
        state["deep"] += 1
        sizes.append(checkpoint.sync(folder, state, keep_bytes=10**9, **QUIET).delta_bytes)
    state["scalar"] += 1
    last = checkpoint.sync(folder, state, keep_bytes=sum(sizes[-2:]), **QUIET).delta_bytes
    kept = checkpoint.history(folder, **QUIET)["bytes"].dropna()
    assert kept.iloc[-1] == last and kept.sum() <= sum(sizes[-2:])
    checkpoint.sync(folder, new_state(), keep=0, **QUIET)
    assert len(checkpoint.history(folder, **QUIET)) == 0


def test_a_model_is_trained_synced_and_loaded(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12).reshape(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    change = checkpoint.sync(folder, model, loss=1.5, **QUIET)
    assert change.id == 1 and not change.copied
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.slow
def test_another_process_loads_what_was_synced(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    checkpoint.sync(folder, model, **QUIET)
    script = (
        "import sys, hashlib, torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "held = load_file(sys.argv[1] + '/model.safetensors')\n"
        "state = model.state_dict()\n"
        "assert all(torch.equal(state[name], tensor) for name, tensor in held.items())\n"
        "print(hashlib.sha256(model(torch.arange(6)[None]).logits.detach().numpy()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    logits = model(torch.arange(6)[None]).logits.detach().numpy()
    assert done.stdout.strip() == sha256(logits).hexdigest()


# Files that others have, too


@pytest.fixture
def hub_cache(tmp_path):
    """As the Hugging Face hub keeps it: a snapshot of links into blobs."""
    written = write_folder(tmp_path / "written", new_state())
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in written.iterdir():
        blob = blobs / sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_shared_blob_is_not_written_through(hub_cache, changed):
    blobs = hub_cache.parent.parent / "blobs"
    before = contents(blobs)
    refuses(
        hub_cache, ["share the bytes", "unshare=True"], lambda: checkpoint.sync(hub_cache, changed)
    )
    change = checkpoint.sync(hub_cache, changed, unshare=True, **QUIET)
    assert same(held(hub_cache), changed) and contents(blobs) == before
    touched = {path.name for path in hub_cache.glob("*.safetensors") if not path.is_symlink()}
    assert touched == set(change.copied) and len(touched) > 0
    assert (hub_cache / "config.json").is_symlink()
    checkpoint.rollback(hub_cache, 0, unshare=True, **QUIET)
    assert same(held(hub_cache), new_state()) and contents(blobs) == before


def test_hard_links_are_not_written_through(folder, changed, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept, copy_function=os.link)
    before = contents(kept)
    refuses(folder, ["2 hard links"], lambda: checkpoint.sync(folder, changed, **QUIET))
    checkpoint.sync(folder, changed, unshare=True, **QUIET)
    assert same(held(folder), changed) and contents(kept) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are seen on Linux only")
def test_a_model_loaded_before_keeps_its_weights(model_folder, tmp_path):
    """On the CPU its parameters are the file itself: a write in place would reach them."""
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "m")
    before, tuned = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1)
    change = checkpoint.sync(folder, tuned, **QUIET)
    assert f"process {os.getpid()}" in change.copied["model.safetensors"]
    assert same(before.state_dict(), weights)
    trained = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    checkpoint.rollback(folder, 0, **QUIET)
    assert same(before.state_dict(), weights) and same(tuned.state_dict(), trained)
    # With part of the state from elsewhere, the rest of it still is the file.
    merged = before.state_dict() | {"model.norm.weight": weights["model.norm.weight"] + 1}
    again = AutoModelForCausalLM.from_pretrained(folder)
    merged = again.state_dict() | {"model.norm.weight": weights["model.norm.weight"] + 1}
    assert checkpoint.sync(folder, merged, **QUIET).copied
    assert same(again.state_dict(), weights)


# Refusals


def test_all_that_does_not_fit_is_told_at_once(folder):
    state = new_state()
    del state["deep"]
    state["more"] = torch.ones(1)
    state["wide"] = state["wide"].T
    state["scalar"] = state["scalar"].double()
    said = ["missing from the state: deep", "more", "wide is [300, 60], not [60, 300]"]
    said += ["scalar is float64, not float32", "Nothing is cast"]
    refuses(folder, said, lambda: checkpoint.sync(folder, state, **QUIET))
    refuses(folder, said, lambda: checkpoint.diff(folder, state, **QUIET))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.empty(60, 300, dtype=torch.bfloat16, device="meta"), "meta device"),
        (torch.ones(60, 300, dtype=torch.bfloat16).to_sparse(), "not dense tensors"),
        ("a string", "not dense tensors"),
    ],
)
def test_what_has_no_bytes_is_refused(folder, value, said):
    state = new_state() | {"wide": value}
    refuses(folder, [said, "wide"], lambda: checkpoint.sync(folder, state, **QUIET))


def test_two_tensors_of_one_name_are_refused(folder):
    state = new_state() | {"other": torch.ones(7000)}
    refuses(
        folder,
        ["go by the name deep"],
        lambda: checkpoint.sync(
            folder, state, names=lambda name: "deep" if name == "other" else name, **QUIET
        ),
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_written_only_if_told(folder, value):
    state = new_state()
    state["wide"][5, 5:7] = value
    refuses(
        folder, ["2 in wide", "allow_nonfinite"], lambda: checkpoint.sync(folder, state, **QUIET)
    )
    checkpoint.sync(folder, state, allow_nonfinite=True, **QUIET)
    assert same(held(folder), state)
    state["deep"] += 1  # the others are in the folder now
    checkpoint.sync(folder, state, **QUIET)
    checkpoint.rollback(folder, 1, **QUIET)


def test_a_full_disk_is_noticed_before(folder, changed, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16 << 20))
    refuses(
        folder, ["MB are needed", "Make room"], lambda: checkpoint.sync(folder, changed, **QUIET)
    )


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("what", ["shards", "folder"])
def test_what_is_read_only_is_refused_but_can_be_compared(folder, changed, what):
    parents = [path for path in folder.parents if path.stat().st_uid == os.getuid()]
    modes = {path: path.stat().st_mode for path in parents}
    for path in folder.glob("*.safetensors"):
        path.chmod(0o444)
    folder.chmod(0o777 if what == "shards" else 0o555)
    user, root = os.geteuid(), os.geteuid() == 0
    try:
        if root:  # root may do anything: be somebody else
            for path in parents:
                path.chmod(modes[path] | 0o111)
            os.seteuid(65534)
        said = "cannot be written to"
        refuses(folder, [said], lambda: checkpoint.sync(folder, changed, **QUIET))
        assert checkpoint.diff(folder, changed, **QUIET)
        assert checkpoint.verify(folder, **QUIET).ok
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)
        folder.chmod(0o755)


def damage_header(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:])


def cut_off(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def edit_index(edit):
    def damage(folder):
        content = json.loads((folder / INDEX).read_text())
        edit(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_header, "cannot be read as safetensors"),
        (cut_off, "bytes, its header speaks of"),
        (lambda folder: (folder / INDEX).write_text("{"), "is damaged"),
        (lambda folder: (folder / INDEX).unlink(), "no model folder"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "No such file"),
        (
            lambda folder: save_file(new_state(), folder / "model.safetensors"),
            "Delete the one that is out of date",
        ),
        (edit_index(lambda listed: listed.pop("deep")), "does not name, or has elsewhere: deep in"),
        (edit_index(lambda listed: listed.update(no=listed["deep"])), "not there: no in"),
        (edit_index(lambda listed: listed.update(deep="../x.safetensors")), "its own folder"),
        (edit_index(lambda listed: listed.clear()), "names no shard"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, damage, said):
    damage(folder)
    refuses(folder, [said], lambda: checkpoint.sync(folder, new_state(), **QUIET))
    refuses(folder, [said], lambda: checkpoint.diff(folder, new_state(), **QUIET))


def test_what_is_no_model_folder_is_left_alone(tmp_path):
    for call in (checkpoint.history, checkpoint.verify, lambda p: checkpoint.sync(p, {})):
        with pytest.raises(CheckpointError, match="no model folder"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_without_whole_bytes_is_named(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": torch.zeros(8, dtype=torch.uint8)}, 1)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"F4"'))
    with pytest.raises(CheckpointError, match="a is F4, which is none of BOOL"):
        checkpoint.diff(folder, {"a": torch.zeros(8)}, **QUIET)


def test_a_state_that_moves_while_it_is_written_is_refused(folder, changed, monkeypatch):
    """Else the folder would hold what its hash and its journal do not know."""
    before = contents(folder)
    commit = transaction.commit

    def train_on(temporary, path):
        commit(temporary, path)
        changed["wide"][4] += 1

    monkeypatch.setattr(transaction, "commit", train_on)
    with pytest.raises(CheckpointError, match="wide changed while it was being written"):
        checkpoint.sync(folder, changed, **QUIET)
    assert contents(folder) == before and not journal.journal_path(folder).exists()


# Locks


def holding(folder, how):
    """A process that holds the folder until a byte is sent to it; its pid and the pipe."""
    ready_end, ready = os.pipe()
    go, go_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with how(folder):
                os.write(ready, b"x")
                os.read(go, 1)
        finally:
            os._exit(0)
    os.read(ready_end, 1)
    return pid, go_end


@pytest.mark.parametrize("how", [access.reading, access.writing])
def test_a_folder_in_use_is_refused_with_the_pid_that_has_it(folder, changed, how):
    pid, go = holding(folder, how)
    try:
        said = [f"process {pid}", "wait=SECONDS"]
        refuses(folder, said, lambda: checkpoint.sync(folder, changed, **QUIET))
        if how is access.reading:
            assert checkpoint.diff(folder, changed, **QUIET), "readers do not keep out readers"
        else:
            refuses(folder, said, lambda: checkpoint.diff(folder, changed, **QUIET))
        with pytest.raises(CheckpointError, match=str(pid)):
            checkpoint.sync(folder, changed, wait=0.1, **QUIET)
    finally:
        os.write(go, b"x")
        os.waitpid(pid, 0)
    assert checkpoint.sync(folder, changed, **QUIET).id == 1


def test_a_sync_waits_as_long_as_it_is_told(folder, changed):
    pid, go = holding(folder, access.reading)
    if os.fork() == 0:
        import time

        time.sleep(0.5)
        os.write(go, b"x")
        os._exit(0)
    assert checkpoint.sync(folder, changed, wait=30, **QUIET).id == 1
    os.waitpid(pid, 0)
    os.wait()


def test_the_same_process_cannot_write_while_it_reads(folder, changed):
    with checkpoint.reading(folder), pytest.raises(CheckpointError, match=str(os.getpid())):
        checkpoint.sync(folder, changed, **QUIET)


# Rollback and history


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_every_state_comes_back_byte_for_byte(tmp_path, data):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, new_state())
    state = new_state()
    states = {0: contents(folder)}
    for _ in range(data.draw(st.integers(1, 3))):
        for name in data.draw(st.lists(st.sampled_from(["wide", "deep", "of.int8"]), min_size=1)):
            bits = state[name].view(-1).view(torch.uint8).numpy()
            start = data.draw(st.integers(0, len(bits) - 1))
            stop = start + data.draw(st.sampled_from([1, 2, 100, 10_000]))
            step = data.draw(st.sampled_from([1, 2, 997]))
            bits[start:stop:step] ^= data.draw(st.integers(1, 255))
        change = checkpoint.sync(folder, state, allow_nonfinite=True, keep=None, **QUIET)
        assert checkpoint.sync(folder, state, allow_nonfinite=True, **QUIET).id is None
        if change.id is not None:
            states[change.id] = contents(folder)
    for id in data.draw(st.permutations(sorted(states))):
        checkpoint.rollback(folder, id, **QUIET)
        assert contents(folder) == states[id]
    assert checkpoint.verify(folder, **QUIET).ok


def test_a_state_is_found_by_its_hash_and_a_rollback_is_undone_by_another(folder, changed):
    first = checkpoint.sync(folder, changed, **QUIET)
    back = checkpoint.rollback(folder, first.parent[:10], why="worse", **QUIET)
    assert back.hash == first.parent and same(held(folder), new_state())
    assert checkpoint.history(folder, **QUIET).loc[2, "facts"] == {"to": 0, "why": "worse"}
    states = checkpoint.history(folder, **QUIET)
    assert checkpoint.rollback(folder, states.index[1], **QUIET).id == 3
    assert same(held(folder), changed)
    assert checkpoint.rollback(folder, 3, **QUIET).id is None, "it is there already"


@pytest.mark.parametrize("to", [7, -1, "ffffff", ""])
def test_a_state_that_is_not_there_is_refused_with_those_that_are(folder, changed, to):
    checkpoint.sync(folder, changed, **QUIET)
    refuses(folder, ["is not one state", "0 ("], lambda: checkpoint.rollback(folder, to, **QUIET))


def test_a_damaged_entry_is_noticed_before_anything_is_written(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    path = folder / ".amygdala" / "history" / "000001.safetensors"
    whole = path.read_bytes()
    for place in range(8, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refuses(folder, [], lambda: checkpoint.rollback(folder, 0, **QUIET))
    path.write_bytes(whole[:-1])
    refuses(folder, ["000001"], lambda: checkpoint.rollback(folder, 0, **QUIET))
    path.write_bytes(whole)
    checkpoint.rollback(folder, 0, **QUIET)
    assert same(held(folder), new_state())


def test_history_does_not_lead_past_a_change_from_outside(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    foreign = changed | {"deep": changed["deep"] + 1}
    shard = json.loads((folder / INDEX).read_text())["weight_map"]["deep"]
    names = load_file(folder / shard)
    save_file({name: foreign[name] for name in names}, folder / shard, metadata={"format": "pt"})
    said = ["something else has changed"]
    refuses(folder, said, lambda: checkpoint.rollback(folder, 0, **QUIET))
    assert not checkpoint.history(folder, **QUIET)["reachable"].any()
    last = {name: tensor.clone() for name, tensor in foreign.items()}
    last["scalar"] += 1
    with pytest.warns(UserWarning, match="something else has changed"):
        checkpoint.sync(folder, last, **QUIET)
    states = checkpoint.history(folder, **QUIET)
    assert list(states.index) == [0, 1, 2] and list(states["reachable"]) == [False, True, True]
    refuses(folder, said, lambda: checkpoint.rollback(folder, 0, **QUIET))


# Verify


def test_verify_records_first_and_then_finds_every_byte_as_it_was(folder, changed):
    first = checkpoint.verify(folder, **QUIET)
    assert first.ok and not first.compared and first.recorded
    second = checkpoint.verify(folder, **QUIET)
    assert second.ok and second.compared and second.hash == first.hash
    assert second.n_bytes == sum(tensor.nbytes for tensor in changed.values())
    change = checkpoint.sync(folder, changed, **QUIET)
    third = checkpoint.verify(folder, **QUIET)
    assert third.ok and third.compared and third.hash != first.hash
    assert third.weights == change.hash


def test_the_hash_is_of_the_model_however_it_is_cut_and_of_every_bit(folder, tmp_path):
    whole = checkpoint.verify(folder, **QUIET)
    single = write_folder(tmp_path / "single", new_state(), n_shards=1)
    assert checkpoint.verify(single, **QUIET).hash == whole.hash
    state = new_state()
    state["of.bool"][0, 0] ^= True
    other = checkpoint.verify(write_folder(tmp_path / "o", state), **QUIET)
    assert other.weights != whole.weights
    (single / "config.json").write_text("{}")
    (single / ".amygdala" / "hashes.safetensors").unlink()
    other = checkpoint.verify(single, **QUIET)
    assert other.hash != whole.hash and other.weights == whole.weights


def test_damage_that_leaves_no_trace_is_found_and_named(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    place = next(iter(shards.ModelFolder.open(folder).tensors["wide"].pieces()[2:]))
    path, times = place.tensor.path, place.tensor.path.stat()
    with path.open("rb+") as file:
        file.seek(place.offset + 5)
        byte = file.read(1)
        file.seek(place.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = checkpoint.verify(folder, **QUIET)
    assert not found.ok and len(found.differences) == 1
    assert "tensor wide differs in 1 of 5 pieces" in found.differences[0]
    assert f"the first {2 * SMALL_PIECE:,} bytes in" in found.differences[0]
    assert "wide" in str(found)
    assert not checkpoint.verify(folder, **QUIET).ok, "a difference is not recorded as the truth"
    # A sync that would take the damage for the old state notices it.
    after = {name: tensor.clone() for name, tensor in changed.items()}
    after["wide"] += 1
    refuses(folder, ["no trace of a write"], lambda: checkpoint.sync(folder, after, **QUIET))


def test_other_files_and_headers_are_verified_too(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    checkpoint.verify(folder, **QUIET)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "README.md").write_text("not the model's")
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b'"pt"', b'"PT"'))
    assert set(checkpoint.verify(folder, **QUIET).differences) == {
        "file config.json differs",
        "file tokenizer.json is gone",
        "file chat_template.jinja is new",
        f"the header of {path.name} differs",
    }


def test_without_a_record_the_history_still_tells(folder, changed):
    checkpoint.sync(folder, changed, **QUIET)
    record = folder / ".amygdala" / "hashes.safetensors"
    record.write_bytes(b"damaged")
    assert checkpoint.verify(folder, **QUIET).ok
    record.unlink()
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "not those the last change led to" in checkpoint.verify(folder, **QUIET).differences[0]


def test_a_sync_hashes_only_what_changes(folder, changed, monkeypatch):
    checkpoint.sync(folder, changed, **QUIET)
    hashed = []
    digest = journal.digest
    for module in ("hashes", "transaction", "journal"):
        monkeypatch.setattr(
            f"amygdala_lib.checkpoint.{module}.digest",
            lambda content: (hashed.append(len(content)), digest(content))[1],
        )
    changed["deep"][0] += 1
    checkpoint.sync(folder, changed, **QUIET)
    assert hashed == [SMALL_PIECE] * 3, "the piece as it is, as it is to be, and as it is written"


# Deltas for others


def test_a_delta_takes_a_change_to_another_copy(folder, changed, tmp_path):
    copy = write_folder(tmp_path / "copy", new_state(), n_shards=1)
    checkpoint.sync(folder, changed, **QUIET)
    changed["deep"] += 0.5
    checkpoint.sync(folder, changed, **QUIET)
    delta = tmp_path / "change.safetensors"
    checkpoint.export_delta(folder, delta, since=0, by="night 12", **QUIET)
    assert all(tensor.dtype == torch.uint8 for tensor in load_file(delta).values())
    assert delta.stat().st_size < sum(tensor.nbytes for tensor in changed.values()) / 2
    change = checkpoint.apply_delta(copy, delta, **QUIET)
    assert same(held(copy), changed)
    assert change.hash == checkpoint.verify(folder, **QUIET).weights
    assert checkpoint.history(copy, **QUIET).loc[1, "facts"] == {"by": "night 12"}
    assert checkpoint.apply_delta(copy, delta, **QUIET).id is None, "it is there already"
    checkpoint.rollback(copy, 0, **QUIET)
    assert same(held(copy), new_state())


def test_by_default_the_last_change_is_exported(folder, changed, tmp_path):
    copy = tmp_path / "copy"
    checkpoint.sync(folder, changed, **QUIET)
    shutil.copytree(folder, copy)
    changed["scalar"] += 1
    checkpoint.sync(folder, changed, **QUIET)
    checkpoint.export_delta(folder, tmp_path / "d", **QUIET)
    checkpoint.apply_delta(copy, tmp_path / "d", **QUIET)
    assert same(held(copy), changed)


def test_a_delta_is_for_the_weights_it_was_made_from(folder, changed, tmp_path):
    refuses(
        folder, ["no history"], lambda: checkpoint.export_delta(folder, tmp_path / "d", **QUIET)
    )
    checkpoint.sync(folder, changed, **QUIET)
    checkpoint.export_delta(folder, tmp_path / "d", **QUIET)
    state = new_state()
    state["of.bool"][0, 0] ^= True
    other = write_folder(tmp_path / "other", state)
    said = ["applies to weights", "take a copy"]
    refuses(other, said, lambda: checkpoint.apply_delta(other, tmp_path / "d", **QUIET))


def test_a_damaged_delta_is_refused(folder, changed, tmp_path):
    copy = write_folder(tmp_path / "copy", new_state())
    checkpoint.sync(folder, changed, **QUIET)
    checkpoint.export_delta(folder, tmp_path / "d", **QUIET)
    whole = (tmp_path / "d").read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        if damaged[8 : 8 + int.from_bytes(whole[:8], "little")].split() != whole[8:].split():
            (tmp_path / "d").write_bytes(damaged)
            refuses(copy, [], lambda: checkpoint.apply_delta(copy, tmp_path / "d", **QUIET))
    (tmp_path / "d").write_bytes(whole[: len(whole) // 2])
    refuses(copy, ["cannot be read"], lambda: checkpoint.apply_delta(copy, tmp_path / "d", **QUIET))
    save_file({"a": torch.ones(1)}, tmp_path / "d")
    refuses(copy, ["is no delta"], lambda: checkpoint.apply_delta(copy, tmp_path / "d", **QUIET))


def test_a_failed_export_leaves_no_file(folder, changed, tmp_path, monkeypatch):
    checkpoint.sync(folder, changed, **QUIET)
    (tmp_path / "d").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.export_delta(folder, tmp_path / "d", **QUIET)
    assert (tmp_path / "d").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "model"]


# The command


def test_the_command_goes_the_whole_way(folder, changed, tmp_path, capsys):
    other = str(write_folder(tmp_path / "other", changed))

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().out

    def run_json(*arguments):
        status, out = run(*arguments, "--json")
        return status, json.loads(out)

    assert run("history", folder) == (0, f"{folder} has no history yet\n")
    status, out = run("diff", folder, other)
    assert status == 1 and "wide" in out and "largest change" in out
    status, found = run_json("diff", folder, other)
    assert status == 1 and found["differs"] and found["total"]["changed_elements"] == 602
    assert {row["tensor"] for row in found["tensors"]} == set(changed)
    status, change = run_json("sync", folder, other, "--fact", "job", "night 12")
    assert status == 0 and change["id"] == 1 and change["shard_bytes"] > 0
    assert run("diff", folder, other)[0] == 0 and same(held(folder), changed)
    assert run("sync", folder, other)[0] == 0
    status, out = run("history", folder)
    assert status == 0 and "job=night 12" in out and change["hash"][:12] in out
    status, states = run_json("history", folder)
    assert [state["id"] for state in states] == [0, 1] and states[1]["hash"] == change["hash"]
    status, out = run("rollback", folder, "--to", "0")
    assert status == 0 and "rollback 2" in out and same(held(folder), new_state())
    assert run("rollback", folder, "--to", change["hash"][:12])[0] == 0
    assert same(held(folder), changed)
    assert run("verify", folder)[0] == 0
    (folder / "config.json").write_text("{}")
    status, found = run_json("verify", folder)
    assert status == 1 and found["differences"] == ["file config.json differs"] and not found["ok"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["diff", "no/such/folder", "x"], "no model folder"),
        (["rollback", "FOLDER", "--to", "3"], "is not one state"),
        (["sync", "FOLDER", "FOLDER", "--fact", "a", "b", "--fact", "a", "c"], "given twice for a"),
        (["sync", "FOLDER", "FOLDER", "--fact", "keep", "b"], "keep cannot name a fact"),
        (["sync", "FOLDER", "FOLDER"], "in use by process"),
    ],
)
def test_the_command_refuses_in_one_message(folder, arguments, said, capsys):
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err and printed.out == ""


@pytest.mark.slow
def test_the_benchmark_prints_all_it_promises(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks.bench_checkpoint", "--gigabytes", "0.02"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--folder", str(tmp_path), "--json", str(out)],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert all(min(taken) > 0 for taken in figures["seconds"].values())
    counted = figures["bytes"]
    assert counted["changed elements"] == pytest.approx(0.001 * counted["model"], rel=0.01)
    assert counted["changed"] <= counted["changed elements"] <= counted["written into shards"]
    for found in figures["comparisons"]:
        assert f"{found['to']} / {found['case']}" in done.stdout
