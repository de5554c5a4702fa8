"""Task vectors add up as numbers do, merge as published, and leave a model as it was."""

import hashlib
import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amygdala_lib import load_model
from amygdala_lib.errors import ArtefactError, CheckpointError, TrainingError
from amygdala_lib.training.named_weights import state_hash
from amygdala_lib.training.task_vectors import TaskVector
from amygdala_lib.training.ties import ties_merge

EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)


def fresh(model_folder, family="qwen3_5", dtype=torch.float32):
    return load_model(model_folder(family), device="cpu", dtype=dtype)


def digest(model):
    whole = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def nudge(model, seed=0, size=0.01, share=1.0):
    """Something like training: other weights in the same model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = size * torch.randn(parameter.shape, generator=generator)
            step *= torch.rand(parameter.shape, generator=generator) < share
            parameter += step.to(parameter.dtype)
    return model


def vector(*values, name="w"):
    return TaskVector.from_tensors({name: torch.tensor(values)})


def listed(tau, name="w"):
    return tau[name].tolist()


# The difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_vector_make_the_tuned_model_again(model_folder, dtype):
    base, tuned = fresh(model_folder, dtype=dtype), fresh(model_folder, dtype=dtype)
    nudge(tuned.model)
    tau = TaskVector.between(base, tuned, progress=False)
    for name, weight in tuned.model.state_dict().items():
        if name in tau.names:
            assert torch.equal(tau[name], weight.float() - base.model.state_dict()[name].float()), (
                name
            )
    tau.apply(base)
    for (name, made), wanted in zip(
        base.model.state_dict().items(), tuned.model.state_dict().values(), strict=True
    ):
        if dtype == torch.bfloat16:
            kept_sign = made.sign() == wanted.sign()
            assert torch.equal(made[kept_sign], wanted[kept_sign]), name
        assert torch.allclose(made, wanted, rtol=1e-6, atol=1e-7), name


def test_tied_weights_are_there_once_under_their_first_name(demo_pair):
    base, tuned = demo_pair
    tau = TaskVector.between(base, tuned, progress=False)
    assert "lm_head.weight" in base.model.state_dict()
    assert tau.names == [name for name, _ in base.model.named_parameters()]
    before = base.model.lm_head.weight.clone()
    with tau.apply(base):
        moved = base.model.lm_head.weight - before
        assert torch.allclose(moved, tau["model.embed_tokens.weight"], atol=1e-6), "once"


@pytest.fixture(scope="module")
def demo_pair():
    base, tuned = (load_model("demo", device="cpu", dtype=torch.float32) for _ in range(2))
    nudge(tuned.model)
    return base, tuned


def test_models_state_dicts_and_folders_give_the_same(model_folder, tmp_path):
    base, tuned = fresh(model_folder, "qwen3"), fresh(model_folder, "qwen3")
    nudge(tuned.model)
    tuned.model.save_pretrained(tmp_path / "tuned", max_shard_size="100KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    expected = TaskVector.between(base, tuned, progress=False)
    held = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    for one, other in (
        (base.model, held),
        (model_folder("qwen3"), tmp_path / "tuned"),
        (base.model.state_dict(), str(tmp_path / "tuned")),
    ):
        found = TaskVector.between(one, other, progress=False)
        assert set(found.names) == set(expected.names)
        assert all(torch.equal(found[name], expected[name]) for name in found.names)
        for key in ("base", "tuned"):
            assert found.provenance[key]["hash"] == expected.provenance[key]["hash"]
    assert expected.provenance["base"] == {"name": "qwen3", "hash": state_hash(base)}
    assert expected.provenance["tuned"]["hash"] != state_hash(base)


def test_a_single_changed_bit_or_name_changes_the_hash():
    weights = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = state_hash(weights)
    assert first == state_hash(dict(reversed(weights.items())))
    assert first != state_hash({**weights, "a": torch.tensor([0.0, -0.0, 0.0])})
    assert first != state_hash({"a": weights["a"], "c": weights["b"]})


def test_weights_that_do_not_fit_are_all_named_at_once():
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "only": torch.zeros(1)}
    tuned = {"a": torch.zeros(3), "b": torch.zeros(2).bfloat16(), "c": torch.zeros(2)}
    with pytest.raises(TrainingError) as refused:
        TaskVector.between(base, {**tuned, "new": torch.zeros(1)}, progress=False)
    for said in (
        "the base lacks new",
        "the tuned lacks only",
        "a (2,) and (3,)",
        "b torch.float32 and torch.bfloat16",
    ):
        assert said in str(refused.value)


def test_integers_are_left_out_if_equal_and_refused_if_not():
    base = {"w": torch.zeros(2), "steps": torch.tensor(3)}
    assert TaskVector.between(base, dict(base), progress=False).names == ["w"]
    with pytest.raises(TrainingError, match="steps hold other integers"):
        TaskVector.between(base, {**base, "steps": torch.tensor(4)}, progress=False)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no model folder"):
        TaskVector.between(tmp_path, tmp_path, progress=False)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        TaskVector.between(tmp_path, tmp_path, progress=False)
    away = {"w": torch.zeros(2, device="meta")}
    with pytest.raises(TrainingError, match="w of a state dict are not in memory"):
        TaskVector.between(away, away, progress=False)
    with pytest.raises(TrainingError, match="int64 cannot hold"):
        TaskVector.between({"w": torch.zeros(2)}, {"w": torch.ones(2)}, dtype=torch.int64)


# Arithmetic


values = st.lists(EIGHTHS, min_size=4, max_size=4)


@given(a=values, b=values, c=values, k=EIGHTHS, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_vectors_add_up_as_numbers_do(a, b, c, k, dtype):
    # Eighths up to 2 and what is made of them here are exact in either dtype.
    a, b, c = (
        TaskVector.from_tensors({"w": torch.tensor(v, dtype=getattr(torch, dtype))})
        for v in (a, b, c)
    )

    def same(one, other):
        return one["w"].dtype == other["w"].dtype and torch.equal(one["w"], other["w"])

    zero = a - a
    assert same(a + b, b + a)
    assert same((a + b) + c, a + (b + c))
    assert same((a + b) - b, a)
    assert same(a + zero, a)
    assert same(-1 * -a, a)
    assert same(a - b, a + -b)
    assert same(2 * a, a + a)
    assert same(a * 0, zero)
    by_hand = [x + y for x, y in zip(listed(a), listed(b), strict=True)]
    assert listed(a + b) == by_hand
    exact = [torch.tensor(k * x, dtype=getattr(torch, dtype)).item() for x in listed(a)]
    assert listed(k * a) == listed(a * k) == exact


@given(seed=st.integers(0, 100), k=st.floats(-3, 3), m=st.floats(-3, 3))
def test_scaling_distributes_to_rounding(seed, k, m):
    generator = torch.Generator().manual_seed(seed)
    a, b = (TaskVector.from_tensors({"w": torch.randn(16, generator=generator)}) for _ in range(2))
    for one, other in ((k * (a + b), k * a + k * b), ((k + m) * a, k * a + m * a)):
        assert torch.allclose(one["w"], other["w"], atol=1e-5)


def test_operands_are_not_changed_and_the_result_says_what_it_is_of():
    a, b = vector(1.0, 2.0), vector(3.0, 4.0)
    total = a + 2 * b
    assert (listed(a), listed(b), listed(total)) == ([1, 2], [3, 4], [7, 10])
    assert total.provenance["operation"] == "add"
    assert total.provenance["of"][1] == {"operation": "scale", "by": 2.0, "of": [{}]}


def test_vectors_that_do_not_fit_are_refused_with_all_that_differs():
    one = TaskVector.from_tensors({"a": torch.zeros(2), "b": torch.zeros(2)})
    other = TaskVector.from_tensors(
        {"a": torch.zeros(2, 1), "b": torch.zeros(2).half(), "c": torch.zeros(1)}
    )
    for refused in (lambda: one + other, lambda: one - other, lambda: ties_merge([one, other])):
        with pytest.raises(TrainingError) as found:
            refused()
        for said in ("first vector lacks c", "a (2,) and (2, 1)", "b torch.float32 and torch.fl"):
            assert said.removeprefix("first vector ") in str(found.value)
    with pytest.raises(TrainingError, match="times nan"):
        one * math.nan
    with pytest.raises(TypeError):
        one + 1
    with pytest.raises(TypeError):
        one * one
    with pytest.raises(TrainingError, match="no 'z' in this vector: it has a, b"):
        one["z"]
    with pytest.raises(TrainingError, match="a hold no differences"):
        TaskVector.from_tensors({"a": torch.zeros(2, dtype=torch.int64)})


# On a live model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 0.02])
def test_a_model_is_as_before_to_the_byte_when_the_vector_is_taken_back(model_folder, dtype, share):
    base, tuned = fresh(model_folder, dtype=dtype), fresh(model_folder, dtype=dtype)
    tau = TaskVector.between(base, nudge(tuned.model, share=share), progress=False)
    before = digest(base.model)
    held = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    with tau.apply(base, 0.7):
        assert digest(base.model) != before
        for name, weight in base.model.state_dict().items():
            expected = (held[name].double() + 0.7 * tau[name].double()).to(dtype)
            assert torch.allclose(weight, expected, rtol=1e-6, atol=1e-7), name
    assert digest(base.model) == before
    applied = tau.apply(base.model, -3)
    applied.undo()
    applied.undo()
    assert digest(base.model) == before


def test_what_is_kept_of_a_sparse_change_is_small(model_folder):
    base, tuned = fresh(model_folder), fresh(model_folder)
    tau = TaskVector.between(base, nudge(tuned.model, share=0.01), progress=False)
    applied = tau.apply(base)
    kept = sum(
        k.values.nbytes + (0 if k.places is None else k.places.nbytes)
        for k in applied._kept.values()
    )
    assert kept < 0.05 * sum(t.numel() * 4 for t in tau.layout.values())


def test_negative_zero_and_every_odd_bit_comes_back():
    model = torch.nn.Linear(3, 1, bias=False).requires_grad_(False)
    model.weight.copy_(torch.tensor([[-0.0, 1e-45, 3.0]]))
    before = digest(model)
    tau = TaskVector.from_tensors({"weight": torch.zeros(1, 3)})
    with tau.apply(model):  # -0 + 0 is 0
        assert digest(model) != before
    assert digest(model) == before


def test_vectors_nest_and_are_taken_back_in_reverse_only(model_folder):
    lm = fresh(model_folder, "qwen3")
    before = digest(lm.model)
    first, second = (
        TaskVector.from_tensors(
            {"model.norm.weight": torch.full((64,), size), "lm_head.weight": head}
        )
        for size, head in ((0.1, torch.zeros(lm.model.lm_head.weight.shape)),) * 2
    )
    outer = first.apply(lm)
    inner = second.apply(lm)
    both = digest(lm.model)
    with pytest.raises(TrainingError, match="model.norm.weight changed since"):
        outer.undo()
    assert digest(lm.model) == both
    inner.undo()
    outer.undo()
    assert digest(lm.model) == before


def test_it_works_on_weights_that_are_being_trained(model_folder):
    lm = fresh(model_folder, "qwen3")
    lm.model.requires_grad_(True)
    tau = TaskVector.from_tensors({"model.norm.weight": torch.ones(64)})
    before = digest(lm.model)
    with tau.apply(lm):
        lm.model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert digest(lm.model) == before
    assert lm.model.model.norm.weight.requires_grad


def test_an_exception_in_the_block_takes_the_vector_back(model_folder):
    lm = fresh(model_folder, "qwen3")
    before = digest(lm.model)
    tau = TaskVector.from_tensors({"model.norm.weight": torch.ones(64)})
    with pytest.raises(KeyboardInterrupt), tau.apply(lm):
        raise KeyboardInterrupt
    assert digest(lm.model) == before


def test_a_refused_or_broken_application_changes_no_byte(model_folder):
    lm = fresh(model_folder, "qwen3", torch.float16)
    before = digest(lm.model)
    wrong = TaskVector.from_tensors(
        {"model.norm.weight": torch.ones(3), "no.such": torch.ones(1), "nor.this": torch.ones(1)}
    )
    with pytest.raises(TrainingError) as refused:
        wrong.apply(lm)
    assert "the model lacks no.such, nor.this" in str(refused.value)
    assert "model.norm.weight (3,) and (64,)" in str(refused.value)
    tau = TaskVector.from_tensors(
        {
            "model.layers.0.input_layernorm.weight": torch.ones(64),
            "model.norm.weight": torch.full((64,), 7e4),
        }
    )
    with pytest.raises(TrainingError, match="model.norm.weight would not be finite in torch.fl"):
        tau.apply(lm)
    with pytest.raises(TrainingError, match="scale is inf"):
        tau.apply(lm, math.inf)

    def read(name):
        if name == "model.norm.weight":
            raise OSError("the disk is gone")
        return torch.ones(64)

    with pytest.raises(OSError, match="gone"):
        TaskVector(tau.layout, read).apply(lm)
    assert digest(lm.model) == before


def test_one_tensor_under_two_names_is_not_changed_twice(demo_pair):
    base, _ = demo_pair
    shape = base.model.lm_head.weight.shape
    both = ("model.embed_tokens.weight", "lm_head.weight")
    tau = TaskVector.from_tensors({name: torch.ones(shape) for name in both})
    before = digest(base.model)
    with pytest.raises(TrainingError, match="lm_head.weight would be changed twice"):
        tau.apply(base)
    assert digest(base.model) == before


# Merging


def trimmed(entries, density):
    kept = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))[
        : int(density * len(entries))
    ]
    return [x if i in kept else 0.0 for i, x in enumerate(entries)]


def merged_as_mergekit(rows, weights, density):
    rows = [[w * x for x in trimmed(row, density)] for row, w in zip(rows, weights, strict=True)]
    out = []
    for column in zip(*rows, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [(x, w) for x, w in zip(column, weights, strict=True) if x * sign > 0]
        divisor = sum(w for _, w in agreeing)
        out.append(sum(x for x, _ in agreeing) / (divisor if divisor != 0 else 1))
    return out


def merged_as_peft(rows, weights, density):
    rows = [trimmed(row, density) for row in rows]
    out = []
    for column in zip(*rows, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [w * x for x, w in zip(column, weights, strict=True) if x * sign > 0]
        out.append(sum(agreeing) / max(len(agreeing), 1))
    return out


NAIVE = {"mergekit": merged_as_mergekit, "peft": merged_as_peft}


@pytest.mark.parametrize("convention", NAIVE)
@given(data=st.data(), density=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, 1.0]))
def test_a_merge_is_what_its_convention_defines(convention, data, density):
    count = data.draw(st.integers(1, 4))
    rows = data.draw(
        st.lists(st.lists(EIGHTHS, min_size=10, max_size=10), min_size=count, max_size=count)
    )
    weights = data.draw(
        st.lists(st.sampled_from([1.0, 0.5, 2.0, 0.25, -0.5, 0.0]), min_size=count, max_size=count)
    )
    vectors = [
        TaskVector.from_tensors({"w": torch.tensor(row).view(2, 5), "v": torch.tensor(row[:1])})
        for row in rows
    ]
    found = ties_merge(vectors, density=density, weights=weights, convention=convention)
    expected = NAIVE[convention](rows, weights, density)
    assert found["w"].shape == (2, 5)
    assert found["w"].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    alone = NAIVE[convention]([row[:1] for row in rows], weights, density)
    assert found["v"].tolist() == pytest.approx(alone, rel=1e-6), "trimmed tensor by tensor"


def test_the_conventions_differ_where_weights_do():
    a, b = vector(4.0, 1.0, 2.0, -8.0), vector(2.0, -3.0, -1.0, 1.0)
    options = {"density": 1.0, "weights": [1.0, 0.25]}
    # First: (1*4 + .25*2) / 1.25, or / 2. Second: 1 - .75 > 0 elects +, but 1 - 3 < 0 elects -.
    assert listed(ties_merge([a, b], **options)) == pytest.approx([3.6, 1.0, 2.0, -8.0])
    peft = ties_merge([a, b], convention="peft", **options)
    assert listed(peft) == pytest.approx([2.25, -0.75, 2.0, -8.0])
    assert peft.provenance["convention"] == "peft"
    equal = {"density": 0.5}
    assert listed(ties_merge([a, b], **equal)) == listed(
        ties_merge([a, b], convention="peft", **equal)
    )


def test_of_equal_magnitudes_the_first_are_kept():
    tau = vector(1.0, -1.0, 1.0, 1.0, 2.0)
    assert listed(ties_merge([tau], density=0.6)) == [1.0, -1.0, 0.0, 0.0, 2.0]


def test_merges_that_cannot_be_made_are_refused_at_once():
    a = vector(1.0, 2.0)
    with pytest.raises(TrainingError) as refused:
        ties_merge([a, a], density=0, weights=[1.0, math.nan, 3.0], convention="magic")
    for said in ("density is 0", "give 2 finite numbers", "no convention 'magic'"):
        assert said in str(refused.value)
    with pytest.raises(TrainingError, match="no vectors"):
        ties_merge([])
    with pytest.raises(TrainingError, match="vector 3 lacks"):
        ties_merge([a, a, vector(1.0, name="other")])


# On disk


@pytest.fixture
def folders(tmp_path):
    """A base and two tuned models of 40 tensors of 256 KB each, in safetensors."""
    for number, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"layers.{n}.weight": torch.randn(256, 256, generator=generator) for n in range(40)
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


class LiveTensors(TorchDispatchMode):
    """The most bytes that the tensors made within the block held at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and not made.is_meta:
                self.alive[id(made)] = weakref.ref(made, partial(self.forget, id(made)))
        held = [ref() for ref in list(self.alive.values())]
        storages = {s.data_ptr(): s.nbytes() for t in held if (s := t.untyped_storage()).nbytes()}
        self.peak = max(self.peak, sum(storages.values()))
        return out

    def forget(self, key, _):
        self.alive.pop(key, None)


def peak_bytes(run):
    with LiveTensors() as tensors:
        run()
    return tensors.peak


def test_vectors_on_disk_are_made_and_merged_in_the_memory_of_a_few_tensors(folders):
    tensor = 256 * 256 * 4
    everything = peak_bytes(
        lambda: TaskVector.between(folders / "base", folders / "one", progress=False)
    )
    assert everything > 40 * tensor, "or the measure is none"
    made = {}

    def differences():
        for name in ("one", "two"):
            made[name] = TaskVector.between(
                folders / "base",
                folders / name,
                to=folders / f"{name}.safetensors",
                progress=False,
            )

    assert peak_bytes(differences) < 10 * tensor
    merge = ties_merge([made["one"], 0.5 * made["two"], made["one"] - made["two"]], density=0.2)
    assert peak_bytes(lambda: merge.save(folders / "merge.safetensors", progress=False)) < (
        12 * tensor
    )
    streamed = TaskVector.load(folders / "merge.safetensors")
    kept = [
        TaskVector.between(folders / "base", folders / name, progress=False)
        for name in ("one", "two")
    ]
    expected = ties_merge([kept[0], 0.5 * kept[1], kept[0] - kept[1]], density=0.2).in_memory()
    assert streamed.names == expected.names
    assert all(torch.equal(streamed[name], expected[name]) for name in expected.names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_vector_is_read_by_anyone_as_it_was(tmp_path, dtype):
    tensors = {
        "scalar": torch.tensor(0.5),
        "odd": torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0)),
        "turned": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 4),
        "ünïcode": torch.ones(1),
    }
    tau = TaskVector.from_tensors({k: t.to(dtype) for k, t in tensors.items()}, {"lesson": "été"})
    path = tau.save(tmp_path / "deep" / "tau.safetensors", progress=False, notebook="14")
    read = TaskVector.load(path)
    by_others = load_file(path)
    assert read.names == list(tensors)
    for name in tensors:
        assert torch.equal(read[name], tau[name]) and read[name].dtype == dtype
        assert torch.equal(by_others[name], tau[name])
    assert read.provenance["lesson"] == "été" and read.provenance["notebook"] == "14"
    assert read.provenance["format_version"] == 1


def test_a_vector_can_be_saved_over_the_file_it_is_read_from(tmp_path):
    path = vector(1.0, 2.0).save(tmp_path / "tau.safetensors", progress=False)
    tau = TaskVector.load(path)
    (3 * tau).save(path, progress=False)
    assert listed(TaskVector.load(path)) == [3.0, 6.0]
    assert listed(tau) == [1.0, 2.0], "who has the old file open keeps it"


def test_a_half_written_vector_is_never_left(tmp_path):
    path = vector(1.0).save(tmp_path / "tau.safetensors", progress=False)
    layout = {"a": torch.zeros(2), "b": torch.zeros(2)}

    def read(name):
        if name == "b":
            raise RuntimeError("killed")
        return torch.zeros(2)

    with pytest.raises(RuntimeError):
        TaskVector(layout, read).save(path, progress=False)
    huge = TaskVector({"w": torch.empty(10**15, device="meta")}, read)
    with pytest.raises(ArtefactError, match="takes 4000000.0 GB"):
        huge.save(path)
    assert listed(TaskVector.load(path)) == [1.0]
    assert [file.name for file in tmp_path.iterdir()] == ["tau.safetensors"]


def test_files_that_are_no_vectors_are_refused(tmp_path):
    path = tmp_path / "tau.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        TaskVector.load(path)
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        TaskVector.load(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match="is no task vector"):
        TaskVector.load(path)


def test_half_the_size_costs_only_rounding():
    base = {"w": torch.zeros(100)}
    tuned = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0))}
    tau = TaskVector.between(base, tuned, dtype=torch.bfloat16, progress=False)
    assert tau["w"].dtype == torch.bfloat16
    assert torch.equal(tau["w"], tuned["w"].bfloat16())
