"""The part of a change that lies within a subspace: `v + (new - v) Q Qᵀ`, for an orthonormal `Q`, `[d, k]`.

With a `Q` that is learned this is distributed alignment search (Geiger et al. 2024, "Finding Alignments Between
Interpretable Causal Variables and Distributed Neural Representations").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees
from nicehooks.values.refusals import TORCH_ERRORS, refused


def checked_basis(basis: Any) -> Tensor | None:
    """`basis`, if it is `[d, k]` with orthonormal columns, or None.

    Raises:
        TreeMismatch: it is something else, as a parameter is that an optimizer has moved.
    """
    if basis is None:
        return None
    if not isinstance(basis, Tensor) or basis.ndim != 2 or not basis.is_floating_point():
        raise TreeMismatch(NO_BASIS.format(what=trees.structure_of(basis)))
    if torch.compiler.is_compiling() or torch_private.innermost_transform() is not None:
        return basis  # its numbers cannot be asked for here
    wide = basis.detach().to(torch.promote_types(basis.dtype, torch.float32))
    error = (wide.T @ wide - torch.eye(wide.shape[1], device=wide.device, dtype=wide.dtype)).abs()
    if error.numel() and not error.max() < TOLERANCE.get(basis.dtype, 0.02):  # NaN too
        raise TreeMismatch(NOT_ORTHONORMAL.format(what=trees.structure_of(basis), error=error.max().item()))
    return basis


TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""By how much a product of two columns may be off; more in short dtypes."""


def within(basis: Tensor, old: Any, new: Any) -> Any:
    """`new` where it differs from `old` within the span of `basis`, and `old` elsewhere; leaf by leaf in a tree."""
    if not any([isinstance(leaf, Tensor) for leaf in trees.leaves(old)]):
        raise TreeMismatch(f"there is no tensor in {trees.structure_of(old)} that could have a subspace")
    replaced = iter(trees.leaves(new))
    return trees.map_tensors(lambda tensor: _moved_within(basis, tensor, _next_tensor(replaced)), old)


def _next_tensor(leaves: Iterator[Any]) -> Tensor:
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _moved_within(basis: Tensor, old: Tensor, new: Tensor) -> Tensor:
    try:
        return old if old is new else _moved(basis, old, new)
    except TORCH_ERRORS as error:
        raise refused(error, f"{trees.structure_of(old)} takes no change within a subspace") from None


def _moved(basis: Tensor, old: Tensor, new: Tensor) -> Tensor:
    if not old.ndim or old.shape[-1] != basis.shape[0] or not old.is_floating_point():
        raise TreeMismatch(
            f"a subspace of {basis.shape[0]} dimensions is none of {trees.structure_of(old)}: its last dimension is to "
            "be the one that the basis, [d, k], has first"
        )
    wide = torch.promote_types(old.dtype, basis.dtype)
    of = trees.beside(trees.usable(basis).to(device=old.device, dtype=wide), old)
    return (old.to(wide) + (new.to(wide) - old.to(wide)) @ of @ of.mT).to(old.dtype)


NO_BASIS = (
    "subspace={what}: it is a matrix [d, k] of floating-point numbers, with k orthonormal columns.\n"
    "    subspace = torch.linalg.qr(directions).Q  # of directions [d, k]"
)

NOT_ORTHONORMAL = (
    "subspace={what}: its columns are not orthonormal (their products are off by up to {error:.2g}), so that it would "
    "not replace the component within a subspace.\n"
    "    subspace = torch.linalg.qr(directions).Q  # of directions [d, k]; gradients go through it"
)
