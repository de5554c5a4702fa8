"""Client: train, read and steer a running server over HTTP."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..errors import LiveError
from ..models import LanguageModel
from .connection import Connection
from .jobs import OBJECTIVES, Refusal, TrainingJob
from .results import FINISHED, JobResult
from .texts import Texts, examples_of, without_weights

if TYPE_CHECKING:
    import openai

    from ..training import Example, Objective

_POLL = 0.1, 2.0  # seconds between looks at a job, at first and at most
_PATIENCE = 120.0  # seconds for a worker that died to be there again


class Client:
    """Speaks to a server that `amygdala serve` has started; a context manager.

    url: "http://127.0.0.1:8000", or "unix:/path/to/socket".
    token: what `amygdala serve` has printed. By default AMYGDALA_TOKEN, or the file `token` in the
        folder AMYGDALA_RUNTIME.
    api_key: of a server that was started with vLLM's own --api-key.
    timeout: seconds for an answer; checkpoints and rollbacks take as long as they take.
    insecure: send the token over plain HTTP to another machine, where others may read it.

    Every method raises LiveError, with the server's own words, for what the server refuses, and if
    there is no server.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        insecure: bool = False,
    ):
        self.url = url
        self._connection = Connection(
            url, token, api_key=api_key, timeout=timeout, insecure=insecure
        )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self.url}>"

    # Training

    def train(
        self,
        examples: Sequence[Example | Mapping[str, Any] | Texts],
        *,
        replay: Sequence[Example | Mapping[str, Any] | Texts] = (),
        objective: str | Objective = "sft",
        model: Path | str | LanguageModel | None = None,
        wait: bool = True,
        progress: bool = True,
        **settings: Any,
    ) -> JobResult | str:
        """Train the served model on examples; its answers change while it is trained.

        examples, replay: of the training package; `{"context_ids": [...], "continuation_ids":
            [...]}`, with `rejected_ids` perhaps; or pairs of texts, context and continuation, with
            a third, the rejected one, perhaps.
        objective: a name, or one of `training.objectives` with its settings.
        model: what turns texts into tokens: a folder, an id, or a loaded model; by default the
            folder the server was started from, which has to be on this machine.
        settings: fields of `TrainingJob` (steps, epochs, batch_size, label, dry_run, ...) and
            settings of Apollo (lr, rank, ...).

        Returns the result, or at once, with `wait` False, the name of the job. Raises LiveError if
        the job is refused or fails; a failed job has changed nothing, or says what it has.
        """
        language_model = cache(lambda: self._language_model(model))
        rows = examples_of(examples, language_model)
        general = examples_of(replay, language_model)
        known = {f.name for f in fields(TrainingJob)}
        job = {name: value for name, value in settings.items() if name in known}
        apollo = {name: value for name, value in settings.items() if name not in known}
        job["settings"] = {**job.get("settings", {}), **apollo}
        job |= _objective(objective)
        job |= {
            "context_ids": [example.context_ids for example in rows],
            "continuation_ids": [example.continuation_ids for example in rows],
            "replay_context_ids": [example.context_ids for example in general],
            "replay_continuation_ids": [example.continuation_ids for example in general],
        }
        if any(example.rejected_ids is not None for example in rows):
            job["rejected_ids"] = [example.rejected_ids for example in rows]
        name = self._connection.ask("POST", "/train", job)["job"]
        return self.wait(name, progress=progress) if wait else name

    def job(self, name: str) -> dict[str, Any]:
        """How far a job has come: its `state`, waiting, training, done or failed, and `result`."""
        return self._connection.ask("GET", f"/train/{quote(name, safe='')}")

    def wait(self, name: str, *, timeout: float | None = None, progress: bool = True) -> JobResult:
        """The result of a job, when there is one.

        A worker that has died is given two minutes to be back. Raises LiveError if the job fails,
        or takes more than `timeout` seconds; it goes on then.
        """
        until = None if timeout is None else time.monotonic() + timeout
        pause, back = _POLL[0], None
        with tqdm(
            desc=name,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not progress,
        ) as bar:
            while True:
                try:
                    found, back = self.job(name), None
                except Refusal as refusal:
                    back = back or time.monotonic() + _PATIENCE
                    if refusal.kind != "down" or time.monotonic() > back:
                        raise
                    found = {"state": "unknown"}
                if found["state"] in FINISHED:
                    return self._finished(name, found, bar)
                _show(bar, found)
                if until is not None and time.monotonic() + pause > until:
                    raise LiveError(
                        f"{name} is not done after {timeout:g} s ({found['state']}): it goes on; "
                        f"ask again with wait({name!r})"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _POLL[1])

    def status(self) -> dict[str, Any]:
        """What server and worker are doing, jobs, checkpoint, memory."""
        return self._connection.ask("GET", "/status")

    def checkpoint(self) -> dict[str, Any]:
        """Write the weights into the server's model folder: only what has changed, crash-safe."""
        return self._connection.ask("POST", "/checkpoint", {}, timeout=None)["checkpoint"]

    def rollback(self, to: int | str) -> dict[str, Any]:
        """Bring folder and served weights back to a state: an id, or the start of its hash.

        What was trained since the last checkpoint is given up, and the optimizer starts anew.
        """
        return self._connection.ask("POST", "/rollback", {"to": to}, timeout=None)["rollback"]

    def history(self) -> pd.DataFrame:
        """The states the server's model folder has been in: a row per state, by `id`."""
        rows = self._connection.ask("GET", "/history", timeout=None)["history"]
        return pd.DataFrame(rows).set_index("id") if rows else pd.DataFrame()

    # Reading and steering

    def readout(self, request_id: str) -> pd.DataFrame:
        """What a request's generated tokens held of every concept, while and after it runs.

        request_id: the `id` of its response. A row per token, layer and concept: `sequence` (of
        several prompts, or n > 1), `position` among the generated tokens, `token_id`, `layer`,
        `concept`, `value`, the projection of the state that the token was chosen from, and `z`, in
        standard deviations.
        """
        return _readout_frame(self._connection.ask("GET", f"/readout/{quote(request_id, safe='')}"))

    def steering(self) -> dict[str, Any]:
        """The `steering` of requests that bring none, and the concepts and layers there are."""
        return self._connection.ask("GET", "/steering")

    def steer(
        self, strengths: Mapping[str, float], layers: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Steer every request from now on that brings no steering of its own.

        strengths: by concept, in units of the layer's mean residual norm, as in `amy.steer`; {}
            ends it. layers: by default all that the server's readout has.
        """
        if not strengths:
            return self._connection.ask("DELETE", "/steering")["steering"]
        content = {"strengths": dict(strengths)}
        content |= {} if layers is None else {"layers": list(layers)}
        return self._connection.ask("PUT", "/steering", content)["steering"]

    # Generation

    def openai(self, **options: Any) -> openai.OpenAI:
        """A client of the `openai` package for the same server, to generate with.

        Raises LiveError, with the command that installs it, if the package is not there.
        """
        try:
            import openai
        except ImportError as error:
            command = f"{sys.executable} -m pip install openai"
            raise LiveError(f"the openai package is not installed: {command}") from error
        return openai.OpenAI(**self._connection.openai_options() | options)

    def _language_model(self, model: Path | str | LanguageModel | None) -> LanguageModel:
        if isinstance(model, LanguageModel):
            return model
        served = model or self.status().get("model")
        if not served:
            raise LiveError("the server does not say which model it serves: pass `model`")
        return without_weights(served)

    def _finished(self, name: str, found: Mapping[str, Any], bar: Any) -> JobResult:
        result = JobResult.from_json(found["result"])
        _show(bar, {"step": len(result.steps), "steps": len(result.steps)})
        if result.state == "failed":
            raise Refusal(result.kind or "failed", f"{name} failed: {result.error}")
        return result


def _readout_frame(found: Mapping[str, Any]) -> pd.DataFrame:
    layers, concepts = found["layers"], found["concepts"]
    sequences = found["sequences"]
    shape = (-1, len(layers), len(concepts))
    values = np.concatenate(
        [np.reshape(np.array(each["values"], float), shape) for each in sequences]
    )
    z = (values - np.array(found["mean"])) / np.array(found["std"])
    lengths = [len(each["positions"]) for each in sequences]
    tokens = pd.DataFrame(
        {
            "sequence": np.repeat(np.arange(len(sequences)), lengths),
            "position": sum((each["positions"] for each in sequences), []),
            "token_id": sum((each["token_ids"] for each in sequences), []),
        }
    )
    cells = len(layers) * len(concepts)
    return (
        tokens.loc[tokens.index.repeat(cells)]
        .assign(
            layer=np.tile(np.repeat(layers, len(concepts)), len(values)),
            concept=pd.Categorical.from_codes(
                np.tile(np.arange(len(concepts)), len(values) * len(layers)), concepts
            ),
            value=values.reshape(-1),
            z=z.reshape(-1),
        )
        .reset_index(drop=True)
    )


def _objective(objective: str | Objective) -> dict[str, Any]:
    if isinstance(objective, str):
        return {"objective": objective}
    from ..training import objectives

    names = {kind: name for name, kind in objectives.OBJECTIVES.items()}
    if type(objective) not in names:
        known = ", ".join(OBJECTIVES)
        raise LiveError(f"a server knows {known}, not {type(objective).__name__}")
    return {"objective": names[type(objective)], "objective_settings": asdict(objective)}


def _show(bar: Any, found: Mapping[str, Any]) -> None:
    if found.get("steps"):
        bar.total = found["steps"]
    if found.get("step"):
        bar.n = found["step"]
    loss = found.get("loss")
    state = found.get("state", "done")
    bar.set_postfix_str(state if loss is None else f"{state}, loss {loss:.4f}", refresh=False)
    bar.refresh()
