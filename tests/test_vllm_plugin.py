"""What the plugin does that can be tried without vLLM: settings, steering, readouts, requests."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib.directions import Directions
from amygdala_lib.errors import LiveError
from amygdala_lib.vllm_plugin import register
from amygdala_lib.vllm_plugin.arrivals import Arrivals
from amygdala_lib.vllm_plugin.export import unshareable
from amygdala_lib.vllm_plugin.hooks import LayerHooks, Step, unhookable
from amygdala_lib.vllm_plugin.readout import Recorder, belongs
from amygdala_lib.vllm_plugin.settings import Settings
from amygdala_lib.vllm_plugin.steering import KEY, MOST, digest, read_steering

CONCEPTS = ["calm", "proud", "sad"]
CPU = torch.device("cpu")


def directions(hidden_size=16, layers=(-1, 1, 3), seed=0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer: torch.randn(3, hidden_size, generator=generator) for layer in layers}
    return Directions(
        CONCEPTS,
        {layer: torch.nn.functional.normalize(v) for layer, v in drawn.items()},
        {layer: 2.0 + abs(layer) for layer in layers},
        {layer: torch.zeros(3) for layer in layers},
        {layer: torch.ones(3) for layer in layers},
    )


# Settings


def test_a_package_that_is_only_installed_changes_no_server(monkeypatch):
    for name in ("AMYGDALA_RUNTIME", "AMYGDALA_READOUT", "VLLM_READOUT_VECTORS"):
        monkeypatch.delenv(name, raising=False)
    register()  # would import vLLM, which is not here, if it did anything


def test_settings_come_from_the_environment(tmp_path):
    environment = {"AMYGDALA_RUNTIME": str(tmp_path), "AMYGDALA_CHECKPOINT_AFTER": "30"}
    settings = Settings.from_environment(environment)
    assert settings.active and settings == Settings(tmp_path, None, 30.0)
    for path in (tmp_path, tmp_path / "readout.safetensors"):
        settings = Settings.from_environment({"VLLM_READOUT_VECTORS": str(path)})
        assert settings == Settings(None, tmp_path, None)
    assert not Settings.from_environment({}).active


def test_all_wrong_settings_are_named_at_once():
    environment = {"AMYGDALA_RUNTIME": "here", "AMYGDALA_CHECKPOINT_AFTER": "soon"}
    with pytest.raises(LiveError, match="(?s)absolute path.*'soon': give seconds"):
        Settings.from_environment(environment)


def vllm_config(**changed) -> SimpleNamespace:
    """The settings that are looked at, of a server that can be trained and read."""
    model = {"enforce_eager": True, "quantization": None, "enable_sleep_mode": False}
    parallel = {"world_size": 1, "data_parallel_size": 1, "pipeline_parallel_size": 1}
    rest = {"use_v2_model_runner": False, "speculative_config": None, "lora_config": None}

    def of(names):
        return SimpleNamespace(**{n: changed.get(n, value) for n, value in names.items()})

    return SimpleNamespace(model_config=of(model), parallel_config=of(parallel), **vars(of(rest)))


@pytest.mark.parametrize(
    ("name", "value", "read", "trained"),
    [
        ("enforce_eager", False, "add --enforce-eager", None),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0", None),
        ("pipeline_parallel_size", 2, "--pipeline-parallel-size", None),
        ("speculative_config", object(), "--speculative-config", "--speculative-config"),
        ("quantization", "fp8", None, "fp8"),
        ("enable_sleep_mode", True, None, "--enable-sleep-mode"),
        ("world_size", 2, None, "--tensor-parallel-size"),
        ("data_parallel_size", 2, None, "--data-parallel-size"),
        ("lora_config", object(), None, "--enable-lora"),
    ],
)
def test_servers_that_cannot_be_read_or_trained_say_which_option_to_change(
    name, value, read, trained
):
    assert unhookable(vllm_config()) == unshareable(vllm_config()) == []
    for problems, said in (
        (unhookable(vllm_config(**{name: value})), read),
        (unshareable(vllm_config(**{name: value})), trained),
    ):
        assert len(problems) == (said is not None) and (said is None or said in problems[0])


# Steering that is asked for


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {}),
        ({"calm": 0}, {}),
        ({"calm": 0.5}, {"strengths": {"calm": 0.5}, "layers": [-1, 1, 3]}),
        ('{"sad": -1, "calm": 0}', {"strengths": {"sad": -1.0}, "layers": [-1, 1, 3]}),
        (
            {"strengths": {"calm": 1}, "layers": [3, 1, 3]},
            {"strengths": {"calm": 1.0}, "layers": [1, 3]},
        ),
    ],
)
def test_steering_is_read(told, expected):
    assert read_steering(told, directions()) == expected


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "no JSON"),
        ("[" * 60_000, "no JSON"),
        ("1" * 70_000, "at most"),
        (3, "give an object"),
        ({"clam": 1, "calm": "x"}, "(?s)do you mean calm.*give a number"),
        ({"calm": math.nan}, "give a number"),
        ({"calm": MOST * 1.01}, "from -10 to 10"),
        ('{"calm": Infinity}', "give a number"),
        ({"strengths": [1]}, "strengths is a list"),
        ({"strengths": {"calm": 1}, "layers": []}, "some of"),
        ({"strengths": {"calm": 1}, "layers": [True]}, "some of"),
    ],
)
def test_steering_that_cannot_be_meant_is_refused(told, said):
    with pytest.raises(LiveError, match=said):
        read_steering(told, directions())


def test_without_residual_norms_there_is_no_unit_to_steer_by():
    dirs = directions()
    dirs.residual_norms.clear()
    with pytest.raises(LiveError, match="residual norms"):
        read_steering({"calm": 1}, dirs)


# Requests as they arrive


def request(extra=None, salt=None):
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(sampling_params=params, cache_salt=salt, request_id="cmpl-1")


@pytest.fixture
def arrivals(tmp_path):
    directions().save(tmp_path / "readout")
    return Arrivals(Settings(None, tmp_path / "readout", None))


def test_caches_are_apart_for_other_weights_other_steering_and_other_salts(arrivals):
    salts = []
    for salt in (None, "mine", json.dumps([None, 0, None])):
        for extra in (None, {KEY: '{"calm": 1}'}, {KEY: '{"calm": 2}'}):
            for arrivals.version in (0, 1):
                salts.append(arrivals.stamp(request(extra, salt)).cache_salt)
    assert len(set(salts)) == len(salts) == 18
    again = arrivals.stamp(request({KEY: {"calm": 2.0, "sad": 0}}, salts[0]))
    assert again.cache_salt == json.dumps(
        [salts[0], 1, digest(read_steering({"calm": 2}, directions()))]
    )


def test_a_request_keeps_the_steering_it_came_with(arrivals):
    other = {"kv_transfer_params": 1}
    plain = arrivals.stamp(request(other))
    assert plain.sampling_params.extra_args == other
    arrivals.default = arrivals.read_steering({"sad": 1})
    steered = arrivals.stamp(request(dict(other)))
    assert steered.sampling_params.extra_args == other | {KEY: arrivals.default}
    own = arrivals.stamp(request({KEY: "{}"}))
    assert own.sampling_params.extra_args is None
    with pytest.raises(LiveError, match="no direction"):
        arrivals.stamp(request({KEY: '{"bored": 1}'}))
    assert arrivals.stamp(SimpleNamespace(sampling_params=None, cache_salt=None)).cache_salt


def test_a_server_without_a_readout_steers_nothing():
    arrivals = Arrivals(Settings(None, None, None))
    arrivals.stamp(request())
    with pytest.raises(LiveError, match="--readout"):
        arrivals.stamp(request({KEY: "{}"}))


def test_tokens_that_were_answered_are_kept_within_bounds(arrivals, monkeypatch):
    monkeypatch.setattr("amygdala_lib.vllm_plugin.arrivals._TOKENS", 50)
    monkeypatch.setattr("amygdala_lib.vllm_plugin.arrivals._REQUESTS", 8)
    for number in range(20):
        for token in range(3):
            arrivals.note(f"cmpl-{number}-0-0000000{number % 10}", [token], finished=token == 2)
    assert [list(arrivals.written(f"cmpl-{n}")) != [] for n in (11, 12, 19)] == [False, True, True]
    (found,) = arrivals.written("cmpl-19").values()
    assert found.finished and found.token_ids == [0, 1, 2]
    arrivals.note("long", range(49), finished=False)
    assert arrivals.written("long") and not arrivals.written("cmpl-18")
    assert arrivals.written("cmpl-19") == {}


# Whose row it is


@pytest.mark.parametrize(
    ("name", "request_id", "is_its"),
    [
        ("cmpl-1", "cmpl-1", True),
        ("cmpl-1-0-0123abcd", "cmpl-1", True),
        ("cmpl-1-12", "cmpl-1", True),
        ("chatcmpl-ab-0123abcd", "chatcmpl-ab", True),
        ("1_cmpl-1-0-0123abcd", "cmpl-1", True),
        ("cmpl-12-0-0123abcd", "cmpl-1", False),
        ("cmpl-1-0-0123abcd", "cmpl", False),
        ("cmpl-1-0-0123abcd", "", False),
        ("cmpl-1-secret-0-0123abcd", "cmpl-1", False),
        ("x_cmpl-1-0-0123abcd", "cmpl-1", False),
    ],
)
def test_a_sequence_belongs_to_the_request_whose_id_it_extends(name, request_id, is_its):
    assert belongs(name, request_id) is is_its


@given(
    steps=st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True), max_size=30),
    capacity=st.integers(1, 12),
)
def test_the_ring_keeps_the_last_rows_and_forgets_whole_requests(steps, capacity):
    dirs = directions(hidden_size=4, layers=(0,))
    recorder = Recorder(dirs, CPU, n_bytes=capacity * 3 * 4)
    assert recorder.capacity == capacity
    written, counts = [], dict.fromkeys(range(6), 0)
    for step in steps:
        states = torch.randn(1, len(step), 4)
        tokens = np.array([counts[r] for r in step], int)
        recorder.record(list(map(str, step)), tokens, np.ones(len(step), bool), states)
        for place, r in enumerate(step):
            written.append((r, counts[r], states[0, place] @ dirs.vectors[0].T))
            counts[r] += 1
        written = written[-capacity:]
    for r in counts:
        expected = [(token, values) for name, token, values in written if name == r]
        found = recorder.of(str(r))
        assert bool(found) == bool(expected)
        if expected:
            assert found[0].positions == [token for token, _ in expected]
            values = found[0].values[:, 0]
            assert torch.allclose(values, torch.stack([v for _, v in expected]), atol=1e-5)


def test_a_token_that_is_taken_back_and_chosen_anew_is_one_row():
    dirs = directions(hidden_size=4, layers=(0,))
    recorder = Recorder(dirs, CPU)
    first, second = torch.ones(1, 1, 4), torch.ones(1, 1, 4) * 2
    for states in (first, second):
        recorder.record(["a"], np.array([7]), np.array([True]), states)
    (found,) = recorder.of("a")
    assert found.positions == [7]
    assert torch.allclose(found.values[0, 0], dirs.vectors[0] @ second[0, 0])


# Hooks on layers


@pytest.fixture(scope="module")
def dirs():
    return directions(hidden_size=64)


def step_of(lengths, steering, chooses=None) -> Step:
    n = len(lengths)
    return Step(
        [f"r{j}" for j in range(n)],
        np.concatenate([[0], np.cumsum(lengths)]),
        np.zeros(n, int),
        np.ones(n, bool) if chooses is None else np.array(chooses),
        [read_steering(how, directions(hidden_size=64)) for how in steering],
    )


class Packed(torch.nn.Module):
    """Layers as vLLM has them: rows of all requests in one, and a residual apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(PackedLayer() for _ in range(5))

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions=None, hidden_states=hidden, residual=residual)
        return hidden + residual


class PackedLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)

    def forward(self, positions, hidden_states, residual):
        # In place, as the fused norm does it.
        residual = hidden_states if residual is None else residual.add_(hidden_states)
        return self.inner(residual).tanh(), residual.clone()


def test_rows_of_other_requests_keep_every_bit(dirs):
    model = Packed()
    hooks = LayerHooks(model, 5, 64, dirs)
    hidden, lengths = torch.randn(12, 64), [3, 5, 1, 3]
    with torch.no_grad():
        expected = model(hidden.clone())
        plain = hooks.during(step_of(lengths, [{}] * 4), lambda: model(hidden.clone()))
        mixed = hooks.during(
            step_of(lengths, [{}, {"calm": 0.5}, {}, {"sad": 2}]), lambda: model(hidden.clone())
        )
        alone = hooks.during(step_of([5], [{"calm": 0.5}]), lambda: model(hidden[3:8].clone()))
        assert torch.equal(model(hidden.clone()), expected), "outside a step nothing happens"
    assert torch.equal(plain, expected)
    for rows, changed in ((slice(0, 3), False), (slice(3, 8), True), (slice(8, 9), False)):
        assert torch.equal(mixed[rows], expected[rows]) is not changed
    assert torch.allclose(mixed[3:8], alone, atol=1e-6)


def test_what_is_read_is_the_stream_after_steering(dirs):
    model = Packed()
    hooks = LayerHooks(model, 5, 64, dirs)
    hidden = torch.randn(7, 64)
    with torch.no_grad():
        hooks.during(
            step_of([4, 3], [{}, {"calm": 0.5}], chooses=[False, True]),
            lambda: model(hidden.clone()),
        )
    assert not hooks.recorder.of("r0"), "a part of a prompt chooses no token"
    (found,) = hooks.recorder.of("r1")
    values = found.values[0]
    push = 0.5 * dirs.residual_norms[-1] * dirs.vectors[-1][0]
    assert torch.allclose(values[0], dirs.vectors[-1] @ (hidden[6] + push), atol=1e-5)


def test_a_forward_that_fails_leaves_no_step_behind(dirs):
    model = Packed()
    hooks = LayerHooks(model, 5, 64, dirs)

    def fail():
        model(torch.randn(2, 64))
        raise ValueError

    with pytest.raises(ValueError):
        hooks.during(step_of([2], [{"calm": 1}]), fail)
    assert not hooks.recorder.of("r0")
    hidden = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(model(hidden.clone()), Packed()(hidden.clone()))


@pytest.mark.parametrize(
    ("layers", "hidden_size", "said"),
    [((7,), 64, r"layers \[7\]"), ((1,), 32, "vectors of 32 do not fit")],
)
def test_directions_of_another_model_are_refused(layers, hidden_size, said):
    with pytest.raises(LiveError, match=said):
        LayerHooks(Packed(), 5, 64, directions(hidden_size, layers))


def test_layers_that_cannot_be_told_are_refused():
    model = torch.nn.ModuleList([Packed(), Packed()])
    with pytest.raises(LiveError, match="2 lists of 5"):
        LayerHooks(model, 5, 64, directions(64))
