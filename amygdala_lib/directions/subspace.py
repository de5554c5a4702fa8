"""`subspace`: directions that a concept's texts span and the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..corpus import Corpus
from .extraction import Spectral, method

RECORDED = 20
"""How many eigenvalues are kept for the spectrum."""


@method("subspace", reads_tokens=True)
def subspace(
    acts: Sequence[Float[Tensor, "tokens hidden"]],
    corpus: Corpus,
    *,
    top: int = 5,
    rank: int | None = None,
    seed: int = 0,
) -> Spectral:
    """The leading eigenvectors of M_pos - M_base, weighted by their eigenvalues.

    With V_i the right singular vectors of text i's (tokens, hidden) activations, all of them or the
    first `rank`, M is the mean of V_i V_i^T over positives, or over negatives. Each of the `top`
    eigenvectors is turned so that positives project higher on it; negative eigenvalues count for
    nothing. Cutting texts to a few directions *before* the eigendecomposition destroys what sets
    them apart.

    Neither M nor a dense eigendecomposition is made: the sum over all texts is computed once, a
    concept adds its own few texts, and block Krylov iteration finds the eigenvectors.
    """
    bases = [_row_space(tokens, rank) for tokens in acts]
    hidden = acts[0].shape[1]
    everything = torch.zeros(hidden, hidden, dtype=acts[0].dtype, device=acts[0].device)
    for start in range(0, len(bases), 16):
        stacked = torch.cat(bases[start : start + 16])
        everything.addmm_(stacked.T, stacked)
    means = torch.stack([tokens.mean(0) for tokens in acts])

    vectors, eigenvalues = [], []
    for concept in tqdm(corpus.concepts, desc="subspaces", unit="concept", delay=2):
        positives = torch.from_numpy(corpus.positives(concept))
        n_positives, n_negatives = len(positives), len(acts) - len(positives)
        own = torch.cat([bases[row] for row in positives])

        def difference(block: Tensor, own=own, n_pos=n_positives, n_neg=n_negatives) -> Tensor:
            shared = everything @ block
            return own.T @ (own @ block) * (1 / n_pos + 1 / n_neg) - shared / n_neg

        values, found = top_eigenpairs(
            difference, hidden, max(RECORDED, top), like=acts[0], seed=seed
        )
        # How much higher the positives' mean token projects than the negatives'.
        others = (means.sum(0) - means[positives].sum(0)) / n_negatives
        gap = means[positives].mean(0) - others
        found = found[:, :top] * torch.where(gap @ found[:, :top] < 0, -1.0, 1.0)
        vectors.append(found @ values[:top].clamp(min=0))
        eigenvalues.append(values[:RECORDED])
    return Spectral(torch.stack(vectors), torch.stack(eigenvalues))


def top_eigenpairs(
    apply: Callable[[Float[Tensor, "hidden block"]], Float[Tensor, "hidden block"]],
    hidden: int,
    count: int,
    *,
    like: Tensor,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> tuple[Float[Tensor, " count"], Float[Tensor, "hidden count"]]:
    """The `count` largest eigenvalues, descending, and eigenvectors of a symmetric operator.

    `apply` multiplies a block of vectors; dtype and device are those of `like`. Iterates until
    ||A v - lambda v|| <= `tolerance` * max |lambda| for each. That bounds the eigenvalue's error,
    which is about its square over the gap to the next: some 1e-6. Fewer than `count` come back
    where `hidden` is smaller.

    Source: block Krylov iteration, Musco & Musco, arXiv 1504.05477, orthogonalised against all
    blocks before, with a restart from the best vectors once they fill the memory.
    """
    width = min(hidden, count + 4)
    largest = min(hidden, 24 * width)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(hidden, width, generator=generator, dtype=torch.float64).to(like)
    space, image = like.new_empty(hidden, largest), like.new_empty(hidden, largest)
    projected, filled = like.new_zeros(largest, largest), 0
    for step in range(1, 400):
        block = _orthonormal(block, space[:, :filled])[:, : largest - filled]
        known, filled = filled, filled + block.shape[1]
        space[:, known:filled] = block
        image[:, known:filled] = block = apply(block)
        edge = space[:, :filled].T @ block
        projected[:filled, known:filled], projected[known:filled, :filled] = edge, edge.T
        exhausted = filled in (known, hidden)  # nothing new is to be found
        full = exhausted or filled == largest
        if not full and (step % 4 or filled < count):
            continue
        values, mixing = torch.linalg.eigh(projected[:filled, :filled])
        values, mixing = values.flip(0)[:width], mixing.flip(1)[:, :width]
        found, moved = space[:, :filled] @ mixing, image[:, :filled] @ mixing
        # In units of the largest eigenvalue; one of zero leaves nothing to divide by.
        scale = values.abs().max().clamp(min=torch.finfo(like.dtype).tiny)
        residuals = (moved - found * values) / scale
        if exhausted or residuals[:, :count].norm(dim=0).max() <= tolerance:
            break
        if full:
            filled = found.shape[1]
            space[:, :filled], image[:, :filled] = found, moved
            projected[:filled, :filled] = values.diag()
            block = residuals
    return values[:count], found[:, :count]


def _orthonormal(
    block: Float[Tensor, "hidden block"], space: Float[Tensor, "hidden known"]
) -> Float[Tensor, "hidden new"]:
    """An orthonormal basis of what `block` adds to `space`, itself orthonormal; maybe nothing."""
    size = torch.linalg.matrix_norm(block)
    for _ in range(2):  # once leaves rounding errors as large as what was taken away
        block = block - space @ (space.T @ block)
    basis, sizes, _ = torch.linalg.svd(block, full_matrices=False)
    basis = basis[:, sizes > 100 * torch.finfo(block.dtype).eps * size]
    basis = basis - space @ (space.T @ basis)
    return torch.linalg.qr(basis)[0]


def _row_space(tokens: Float[Tensor, "tokens hidden"], rank: int | None) -> Tensor:
    """Orthonormal rows that span a text's activations: its right singular vectors."""
    _, singular_values, rows = torch.linalg.svd(tokens, full_matrices=False)
    floor = singular_values[0] * max(tokens.shape) * torch.finfo(tokens.dtype).eps
    return rows[singular_values > floor][:rank]
