"""Apollo: Adam's step sizes per channel, learnt from a random projection of each gradient."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import TrainingError
from . import optimizer_state
from .updates import Member, channel_squares_of, count_step, update_projected, update_unprojected

# Weights of up to so many entries are stacked, up to so many at once: more would gain nothing.
_SMALL, _STACK = 2**18, 2**22


class Apollo(Optimizer):
    """A full-rank step whose size per channel comes from Adam's moments of a random projection.

    For a weight W (m x n, m <= n; else all is transposed) with gradient G, at step t (arXiv
    2412.05270, algorithm 1):

        R = P G                        P (rank x m), entries N(0, 1 / rank)
        M = b1 M + (1 - b1) R          V = b2 V + (1 - b2) R^2
        R~ = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)
        s_j = |R~_j| / |R_j|           of each column j; of the whole matrix if rank is 1 (Mini)
        U = scale G diag(s)            shrunk so that |U_t| <= norm_growth_limit |U_t-1|
        W = W - lr weight_decay W - lr U

    The state is M and V, 2 n rank numbers a matrix in float32, and two scalars. P is not stored: it
    is made at every step from (seed, name of the parameter, number of refreshes), alike on every
    device (`random_streams`). torch's global random state is neither read nor changed. A stack of
    matrices, as a layer's experts (E, m, n), is E matrices with one P.

    Vectors, matrices whose shorter side does not exceed the rank or is below 8, weights of more
    than three dimensions and all of a group with rank None are updated by torch's AdamW, with
    moments in float32.

    params: parameters, (name, parameter) pairs as of `model.named_parameters()`, or groups of
        either with settings of their own. A parameter without a name has its number for one: with
        names, P does not depend on the order, and a saved state fits only the model it is of.
    lr: with scale "auto", one that suits AdamW is a good first try.
    rank: rows of P. 1 is Mini; 256 captures the gradients of a hundred examples or more.
    scale: "auto" is sqrt(m / rank), which makes up for what the projection takes from s: measured
        on random matrices, s is sqrt(rank / m) of what it is without one. The paper's theorem has
        sqrt(n / rank); its authors' settings are 1, and sqrt(128) for Mini.
    proj_refresh: steps for which P stays the same.
    norm_growth_limit: None for no limit. The limit is at least `updates.LIMITER_FLOOR` * scale *
        sqrt(rank * n), and an update of nothing but zeros is passed over: or a run of weak
        gradients, or an expert that no token chose, would hold back hundreds of steps to come.
    stochastic_rounding: of bfloat16 weights, with noise from (seed, name, step). Rounded to
        nearest, a small update is lost, however often it comes.
    warmup_steps: the learning rate rises linearly over the first so many steps of a parameter.
    foreach: stack small weights of one shape, 4 million numbers at a time: faster, and equal up to
        the order of sums.

    Gradients may be sharded over a mesh of devices (DTensor, as by FSDP2): projections and norms
    are summed over the mesh, and M and V of projected weights are whole on every rank.

    Raises TrainingError for settings that cannot be used, naming all of them.
    """

    _stepping_in_backward = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        rank: int | None = 64,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float | Literal["auto"] = "auto",
        proj_refresh: int = 200,
        norm_growth_limit: float | None = 1.01,
        seed: int = 0,
        stochastic_rounding: bool = True,
        warmup_steps: int = 0,
        foreach: bool = True,
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "proj_refresh": proj_refresh,
            "norm_growth_limit": norm_growth_limit,
            "seed": seed,
            "stochastic_rounding": stochastic_rounding,
            "warmup_steps": warmup_steps,
            "foreach": foreach,
        }
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every torch optimizer. Raises TrainingError for what cannot be used."""
        problems = _problems(self.defaults | param_group)
        super().add_param_group(param_group)
        names = Counter(name for name, _, _ in self.members())
        if twice := [name for name, count in names.items() if count > 1]:
            problems.append(f"more than one parameter is called {', '.join(twice)}: rename them")
        if complex_ := [name for name, weight, _ in self.members() if weight.is_complex()]:
            problems.append(f"complex parameters are not supported: {', '.join(complex_)}")
        if problems:
            self.param_groups.pop()
            raise TrainingError("\n".join(problems))

    def members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and group of every parameter, in the order they were given."""
        number = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, weight in enumerate(group["params"]):
                yield names[place] if names else str(number), weight, group
                number += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure`, called first, does.

        Raises TrainingError, and changes nothing, if a gradient is sparse or has NaN, infinite or
        overflowing entries, or within `step_in_backward`.
        """
        if self._stepping_in_backward:
            raise TrainingError("within `step_in_backward` backward() steps: leave out step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update([found for found in self.members() if found[1].grad is not None])
        return loss

    @contextmanager
    def step_in_backward(self) -> Iterator[None]:
        """Within the block, backward() updates each parameter as its gradient arrives.

        The gradient is freed then, so that gradients take the memory of a matrix or two instead of
        the whole model's. The numbers are those of backward() and step(). What is lost: every
        backward() is a step, so gradients cannot be accumulated over several; they cannot be
        clipped by the norm of all, which are never there at once; hooks of step() do not run; and a
        gradient that is not finite raises TrainingError from backward() when the parameters whose
        gradients came earlier, in later layers mostly, have been updated already. Its own parameter
        and all others are left alone.

        Raises TrainingError if there are gradients already, which would be accumulated, if
        parameters are sharded, or within another such block.
        """
        self._check_before_backward()
        hooks = []
        try:
            self._stepping_in_backward = True
            for member in self.members():
                if member[1].requires_grad:
                    hook = self._hook(member)
                    hooks.append(member[1].register_post_accumulate_grad_hook(hook))
            yield
        finally:
            self._stepping_in_backward = False
            for hook in hooks:
                hook.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`: settings, as in every torch optimizer, and moments, exactly.

        Raises TrainingError, and changes nothing, if it is of other parameters or another rank.
        """
        optimizer_state.check_fit(self, state_dict)
        super().load_state_dict(dict(state_dict))
        # torch has cast the moments to the dtypes of the weights.
        for number, (_, weight, _) in zip(
            optimizer_state.numbers(state_dict), self.members(), strict=True
        ):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[weight][key] = optimizer_state.placed(value, weight)

    def save_state(self, path: Path | str) -> Path:
        """Write settings, step counts and moments as safetensors, whole or not at all.

        With sharded parameters every rank has to call it, and the first writes.
        """
        return optimizer_state.save(self, Path(path))

    def load_state(self, path: Path | str) -> None:
        """Take over what `save_state` wrote: the next step is what it would have been, to the bit.

        The settings are the file's, the learning rate among them. Raises ArtefactError if the file
        is missing or damaged, and TrainingError with both values if it is of other parameters,
        shapes or another rank; nothing is changed then.
        """
        optimizer_state.load(self, Path(path))

    def _check_before_backward(self) -> None:
        problems = []
        if self._stepping_in_backward:
            problems.append("`step_in_backward` is active already: use one block")
        if there := [name for name, weight, _ in self.members() if weight.grad is not None]:
            problems.append(
                f"{len(there)} gradients are there already ({there[0]} first), and "
                "`step_in_backward` cannot accumulate: call zero_grad() before"
            )
        if sharded := [name for name, weight, _ in self.members() if isinstance(weight, DTensor)]:
            problems.append(f"{sharded[0]} is sharded: use step() instead of `step_in_backward`")
        if problems:
            raise TrainingError("\n".join(problems))

    def _hook(self, member: tuple[str, Tensor, dict[str, Any]]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def update(weight: Tensor) -> None:
            try:
                self._update([member])
            finally:
                weight.grad = None
            self._opt_called = True  # or torch's schedulers warn that step() never was

        return update

    def _update(self, found: list[tuple[str, Tensor, dict[str, Any]]]) -> None:
        members = [Member(*entry, self.state.get(entry[1], {})) for entry in found]
        squares = channel_squares_of(members)
        together = defaultdict(list)
        for member in members:
            count_step(member)
            self.state[member.weight] = member.state  # only now: a refused step leaves no trace
            together[_kind(member)].append(member)
        for same in together.values():
            if same[0].is_projected:
                at_once = max(1, _STACK // same[0].weight.numel())
                for first in range(0, len(same), at_once):
                    update_projected(same[first : first + at_once], squares)
            else:
                update_unprojected(same)


def _kind(member: Member) -> tuple:
    """Equal for parameters that are updated together."""
    weight = member.weight
    alone = weight.numel() > _SMALL or isinstance(weight, DTensor) or not member.group["foreach"]
    if alone or (member.is_projected and weight.ndim == 3):
        return (member.name,)
    shape = weight.shape if member.is_projected else None
    return id(member.group), member.state["step"], member.dtype, weight.device, shape


def _problems(settings: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a group's settings."""
    rules = {
        "lr": (lambda value: value >= 0, "at least 0"),
        "rank": (lambda value: value is None or index(value) >= 1, "1 or more, or None"),
        "betas": (lambda pair: len(pair) == 2 and all(0 <= b < 1 for b in pair), "two in [0, 1)"),
        "eps": (lambda value: value > 0, "above 0"),
        "weight_decay": (lambda value: value >= 0, "at least 0"),
        "scale": (lambda value: value == "auto" or 0 < value < math.inf, '"auto" or above 0'),
        "proj_refresh": (lambda value: index(value) >= 1, "1 or more"),
        "norm_growth_limit": (lambda value: value is None or value > 1, "above 1, or None"),
        "seed": (lambda value: index(value) == value, "a whole number"),
        "warmup_steps": (lambda value: index(value) >= 0, "0 or more"),
    }
    problems = []
    for name, (is_fine, wanted) in rules.items():
        try:
            fine = is_fine(settings[name])
        except (TypeError, ValueError):
            fine = False
        if not fine:
            problems.append(f"{name} is {settings[name]!r}: it has to be {wanted}")
    return problems
