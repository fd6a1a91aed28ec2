"""`steering_vector`: the direction from one set of inputs to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nicehooks.caches.arguments import BadArgument
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.core.selection import Where, select
from nicehooks.errors import TreeMismatch
from nicehooks.harvesting.inputs import Batch, BatchFault, batches_of, check_has_rows, check_stream

Method = Literal["mean", "pca"]
TakenAt = Literal["last", "mean"]


def steering_vector(
    model: nn.Module,
    where: Where,
    positives: Any,
    negatives: Any,
    method: Method = "mean",
    position: TakenAt = "last",
) -> Any:
    """The direction at a place that leads from `negatives` to `positives`; `steer(model, where, vector)` goes along it.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    >>> vector = steering_vector(model, "0", torch.tensor([[1, 2], [3, 2]]), torch.tensor([[1, 5], [3, 5]]))
    >>> torch.allclose(vector, model[0].weight[2] - model[0].weight[5])
    True

    Args:
        model: any module.
        where: paths, sites, … (see `select`).
        positives: what has more of it: one batch, or an iterable of them, as for `harvest`.
        negatives: what has less of it.
        method: `"mean"`, the difference of the two means (Turner et al. 2023, https://arxiv.org/abs/2308.10248; Marks
            and Tegmark 2023, https://arxiv.org/abs/2310.06824); or `"pca"`, the direction along which the pairs of a
            positive and a negative differ most, as long as they differ along it on average (Zou et al. 2023,
            https://arxiv.org/abs/2310.01405).
        position: of a value `[batch, pos, d]`, which is taken: that of each example's last token, or the mean over its
            tokens; padding, which `attention_mask` tells, is neither.

    Returns:
        The vector `[d]`; where there are several places, an `ActivationCache` of one for each.

    Raises:
        SiteNotFound: `where` selects nothing.
        TreeMismatch: a value is no tensor `[batch, d]` or `[batch, pos, d]`; with `"pca"`, there are not as many
            positives as negatives, or their differences are not finite.
        BatchFault: an input is no batch, or has an example without a token.
        BadArgument: there is no such method, or position.
    """
    if method not in ("mean", "pca") or position not in ("last", "mean"):
        raise BadArgument(f"method={method!r}, position={position!r}: 'mean' or 'pca', and 'last' or 'mean'")
    for site in select(model, where):
        check_has_rows(site, "example")
    more, less = [_examples(model, where, inputs, position) for inputs in (positives, negatives)]
    direction = _mean if method == "mean" else _principal
    found = {key: direction(more[key].double(), less[key].double(), key).to(more[key].dtype) for key in more}
    return next(iter(found.values())) if len(found) == 1 else ActivationCache(found)


def _mean(more: Tensor, less: Tensor, key: str) -> Tensor:
    return more.mean(0) - less.mean(0)  # in float64: the two may be large, and near each other


def _principal(more: Tensor, less: Tensor, key: str) -> Tensor:
    """The first principal direction of the differences, whose signs mean nothing in pairs of random order."""
    if more.shape != less.shape:
        raise TreeMismatch(
            f"{key!r}: method='pca' takes pairs, and there are {len(more)} positives for {len(less)} negatives."
        )
    differences = more - less
    if not differences.isfinite().all():
        raise TreeMismatch(f"{key!r}: method='pca' takes finite values, and there are NaN or infinite ones.")
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return direction * (differences @ direction).mean()


def _examples(model: nn.Module, where: Where, inputs: Any, position: TakenAt) -> dict[str, Tensor]:
    """`[example, d]` at each place."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches_of([inputs] if isinstance(inputs, Tensor | Mapping) else _listed(inputs)):
        _check_texts(batch)
        device = next((parameter.device for parameter in model.parameters()), None)
        with torch.no_grad(), capture(model, where, stop=True) as acts:
            batch.run(model, device)
        for key, value in acts.items():
            found.setdefault(key, []).append(_one_each(value, batch, position, key))
    return {key: torch.cat(values) for key, values in found.items()}


def _check_texts(batch: Batch) -> None:
    """Raises a `BatchFault` where an example has no token whose value could be taken."""
    first = batch.tensors[0]
    if batch.ids is None and first.ndim == 1 and not first.is_floating_point():
        raise BatchFault(f"batch {batch.number} has the shape {list(first.shape)}: one text is [1, pos], ids[None].")
    lengths = batch.mask.sum(1) if batch.mask is not None else None if batch.ids is None else batch.ids.shape[1:]
    if not len(batch.samples) or (lengths is not None and 0 in lengths):
        raise BatchFault(f"batch {batch.number} has an example with no token, or nothing but padding, or no example.")


def _listed(inputs: Iterable[Any]) -> list[Any]:
    check_stream([] if isinstance(inputs, str) else inputs)  # a text is told as a batch that is none
    batches = list(inputs)
    if not batches:
        raise TreeMismatch("steering_vector takes at least one positive and one negative input: there is none.")
    return batches


def _one_each(value: Any, batch: Batch, position: TakenAt, key: str) -> Tensor:
    """One row for each example."""
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or len(value) != len(batch.samples):
        shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TreeMismatch(f"{key!r} has {shown}: steering_vector takes values [batch, d] or [batch, pos, d].")
    if value.ndim == 2:
        return value.detach()
    known = batch.mask if batch.ids is None else batch.ids
    if known is not None and value.shape[:2] != known.shape:
        raise TreeMismatch(f"{key!r} has {list(value.shape)}: the tokens are {list(known.shape)}.")
    mask = torch.ones(value.shape[:2], dtype=torch.bool) if batch.mask is None else batch.mask
    if position == "last":  # whole numbers: bfloat16 does not tell position 257 from 256
        last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1).to(value.device)
        return value.detach()[torch.arange(len(value), device=value.device), last]
    weights = mask.to(value.device)
    exact = value.detach().double() * weights[..., None]
    return (exact.sum(1) / weights.sum(1, keepdim=True)).to(value.dtype)
