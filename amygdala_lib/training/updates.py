"""Apollo's and AdamW's update of weights, one or several at a time, in pieces that bound memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..errors import TrainingError
from .projection import (
    as_matrices,
    channel_squares,
    draw_projections,
    is_projected,
    moment_shape,
    pieces,
    project,
    replicated,
)
from .random_streams import stream_key
from .rounding import round_stochastically

LIMITER_FLOOR = 0.1  # of the norm of an update that moves every entry by the learning rate


@dataclass(frozen=True)
class Member:
    """A parameter that has a gradient, and all that its update needs."""

    name: str
    weight: Tensor
    group: dict[str, Any]
    state: dict[str, Any]

    @property
    def gradient(self) -> Tensor:
        return self.weight.grad

    @property
    def dtype(self) -> torch.dtype:
        """Of moments, norms and the arithmetic: float32, or float64 for a float64 gradient."""
        return torch.promote_types(self.gradient.dtype, torch.float32)

    @property
    def is_projected(self) -> bool:
        return is_projected(self.weight.shape, self.group["rank"])

    @property
    def learning_rate(self) -> float:
        """At the step that has been counted in the state."""
        warm = self.state["step"] / max(1, self.group["warmup_steps"])
        return float(self.group["lr"]) * min(1.0, warm)


def channel_squares_of(members: list[Member]) -> dict[str, Tensor]:
    """Sums of squares per channel of what is projected; TrainingError unless all is finite.

    The limiter needs them, and a NaN or infinity anywhere shows in them, so that checking large
    gradients takes no pass of its own.
    """
    if sparse := [member.name for member in members if member.gradient.is_sparse]:
        raise TrainingError(f"sparse gradients are not supported: {', '.join(sparse)}")
    squares, totals = {}, []
    for member in members:
        if member.is_projected:
            squares[member.name] = channel_squares(as_matrices(member.gradient), member.dtype)
            total = squares[member.name].sum()
        else:
            total = torch.linalg.vector_norm(member.gradient, dtype=member.dtype)
        totals.append(total.full_tensor() if isinstance(total, DTensor) else total)
    if totals:
        together = torch.stack([total.to(totals[0].device) for total in totals])
        fine = together.isfinite().tolist()
        bad = [member.name for member, good in zip(members, fine, strict=True) if not good]
        if bad:
            raise TrainingError(
                f"step refused: {len(bad)} gradients have NaN, infinite or overflowing entries, "
                f"{bad[0]} first. Look at the loss, or lower the learning rate"
            )
    return squares


def count_step(member: Member) -> None:
    """One more step; moments of zero before the first."""
    state, weight = member.state, member.weight
    if not state:
        state["step"] = 0
        for moment in ("exp_avg", "exp_avg_sq"):
            if member.is_projected:
                shape = moment_shape(weight.shape, member.group["rank"])
                state[moment] = torch.zeros(shape, dtype=member.dtype, device=weight.device)
            else:
                state[moment] = torch.zeros_like(weight, dtype=member.dtype)
        if member.is_projected:  # no update before the first, so nothing to limit it by
            state["update_norm"] = state["exp_avg"].new_full(
                (len(state["exp_avg"]), 1, 1), math.inf
            )
    state["step"] += 1


def update_projected(batch: list[Member], squares: dict[str, Tensor]) -> None:
    """One step of weights of one shape that have taken equally many."""
    first = batch[0]
    group, step, rank = first.group, first.state["step"], first.group["rank"]
    short, long = sorted(first.weight.shape[-2:])
    refreshes = (step - 1) // group["proj_refresh"]
    keys = [stream_key("projection", group["seed"], found.name, refreshes) for found in batch]
    projections = draw_projections(keys, rank, short, first.weight.device, first.dtype)
    gradients = [found.gradient for found in batch]
    stacked = as_matrices(torch.stack(gradients) if len(batch) > 1 else gradients[0])
    projected = project(projections, stacked)
    adapted = _adapt(batch, projected)

    over = (1, 2) if rank == 1 else (1,)
    before = projected.square_().sum(over, keepdim=True).sqrt_()
    ratio = adapted.square_().sum(over, keepdim=True).sqrt_().div_(before)
    alpha = math.sqrt(short / rank) if group["scale"] == "auto" else group["scale"]
    # A channel without gradient stays as it is, as does one so weak that its squares underflow.
    weakest = torch.finfo(first.dtype).tiny ** 0.4
    scale = torch.where(before > weakest, ratio, 0).mul_(alpha)
    of_channels = torch.cat([squares[found.name] for found in batch])
    floor = LIMITER_FLOOR * alpha * math.sqrt(rank * long)
    scale = _limit(batch, scale.expand(-1, -1, long), of_channels, floor)
    for found, factors in zip(batch, scale.split(len(scale) // len(batch)), strict=True):
        _descend(found, factors)


def _adapt(batch: list[Member], projected: Tensor) -> Tensor:
    """Take the projected gradients into the moments; returns Adam's direction R~ of each."""
    group, step = batch[0].group, batch[0].state["step"]
    first_beta, second_beta = group["betas"]
    mean, square = (
        torch.cat([found.state[moment] for found in batch])
        if len(batch) > 1
        else batch[0].state[moment]
        for moment in ("exp_avg", "exp_avg_sq")
    )
    mean.lerp_(projected, 1 - first_beta)
    square.mul_(second_beta).addcmul_(projected, projected, value=1 - second_beta)
    if len(batch) > 1:
        for found, its_mean, its_square in zip(batch, mean.split(1), square.split(1), strict=True):
            found.state["exp_avg"].copy_(its_mean)
            found.state["exp_avg_sq"].copy_(its_square)
    spread = square.sqrt().div_(math.sqrt(1 - second_beta**step)).add_(group["eps"])
    return torch.div(mean, spread, out=spread).div_(1 - first_beta**step)


def _limit(batch: list[Member], scale: Tensor, squares: Tensor, floor: float) -> Tensor:
    """`scale`, shrunk where an update's norm would grow too much; keeps the norms.

    scale and squares are (matrices, 1, n): the factors of the gradients' channels, and the sums of
    squares of those.
    """
    growth = batch[0].group["norm_growth_limit"]
    norm = squares.sqrt().mul_(scale).square_().sum(2, keepdim=True).sqrt_()
    previous = torch.cat([found.state["update_norm"] for found in batch])
    if growth is not None:
        shrunk = previous.clamp_min(floor).mul_(growth).div_(norm).clamp_max_(1)
        scale, norm = scale * shrunk, norm * shrunk
    norm = torch.where(norm > 0, norm, previous)
    for found, kept in zip(batch, norm.split(len(norm) // len(batch)), strict=True):
        found.state["update_norm"].copy_(kept)
    return scale


def _descend(member: Member, factors: Tensor) -> None:
    """W = (1 - lr weight_decay) W - lr G diag(factors)."""
    weights, gradient = as_matrices(member.weight), as_matrices(member.gradient)
    if isinstance(weights, DTensor):
        gradient = (gradient.to(member.dtype) * replicated(factors, gradient)).to_local()
        weights = weights.to_local()
        factors = factors.new_ones(len(gradient), 1, gradient.shape[2])
    kept = 1 - member.learning_rate * member.group["weight_decay"]
    changes = factors * -member.learning_rate
    if weights.dtype == member.dtype:
        (weights.mul_(kept) if kept != 1 else weights).addcmul_(gradient, changes)
        return
    start = 0
    for piece in pieces(weights):
        which, _, long = piece
        part = weights[piece]
        change = gradient[piece].to(member.dtype) * changes[which, :, long]
        part.copy_(_rounded(member, part.to(member.dtype).mul_(kept).add_(change), start))
        start += part.numel() + -part.numel() % 4


def update_unprojected(batch: list[Member]) -> None:
    """One step of AdamW of small weights together, or of another in pieces."""
    held = [(m.weight, m.gradient, m.state["exp_avg"], m.state["exp_avg_sq"]) for m in batch]
    if len(batch) > 1 or batch[0].weight.ndim > 3 or isinstance(batch[0].weight, DTensor):
        _adamw(batch, held, 0)
        return
    views = [as_matrices(tensor) for tensor in held[0]]
    start = 0
    for piece in pieces(views[0]):
        parts = tuple(view[piece] for view in views)
        _adamw(batch, [parts], start)
        start += parts[0].numel() + -parts[0].numel() % 4


def _adamw(batch: list[Member], held: list[tuple[Tensor, ...]], start: int) -> None:
    """torch's AdamW on (weight, gradient, moment, moment), in float32 or more."""
    first = batch[0]
    weights = [weight.to(first.dtype) for weight, *_ in held]
    adamw(
        weights,
        [gradient.to(first.dtype) for _, gradient, *_ in held],
        [mean for _, _, mean, _ in held],
        [square for *_, square in held],
        [],
        [torch.tensor(first.state["step"] - 1.0) for _ in held],  # counts by itself
        foreach=True,
        amsgrad=False,
        beta1=first.group["betas"][0],
        beta2=first.group["betas"][1],
        lr=first.learning_rate,
        weight_decay=first.group["weight_decay"],
        eps=first.group["eps"],
        maximize=False,
    )
    for member, (weight, *_), updated in zip(batch, held, weights, strict=True):
        if updated is not weight:
            _local(weight).copy_(_rounded(member, _local(updated), start))


def _rounded(member: Member, values: Tensor, start: int) -> Tensor:
    """`values` in the dtype of the weight; noise by seed, name, step, shard and place."""
    weight = member.weight
    if not (weight.dtype == torch.bfloat16 and member.group["stochastic_rounding"]):
        return values.to(weight.dtype)
    shard = ()
    if isinstance(weight, DTensor):
        where = zip(weight.device_mesh.get_coordinate(), weight.placements, strict=True)
        shard = tuple(place for place, placement in where if placement.is_shard())
    seed, step = member.group["seed"], member.state["step"]
    return round_stochastically(
        values, stream_key("rounding", seed, member.name, step, shard), start
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
