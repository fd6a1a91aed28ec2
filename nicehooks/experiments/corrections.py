"""AtP*: two corrections of effects that are estimated from gradients, for transformers.

Kramár et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components".

NOTE [Queries and keys]
Attention that is saturated has no slope, though a large change of a query or a key moves it. So for these the pattern
is computed anew: what is linear is the way from the pattern to the metric. One run gives the scores of all changed
queries, one those of all changed keys: each attention gives its old result on, so that only its own scores are new.

NOTE [A layer left out]
Where what a cell does directly and what it does by way of a later layer cancel each other, the gradient is next to
nothing, and so is its sign. With what one layer adds to the residual stream taken for a constant the balance is broken.
A pass for each layer; the estimate is the mean of their sizes, over the passes in which the cell has a gradient at all
(in that of its own layer it has none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nicehooks.anatomies.anatomy import Anatomy, EncoderDecoder, Part, anatomy
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.changes import edit
from nicehooks.contexts.patching import patch
from nicehooks.errors import UnsupportedModule
from nicehooks.experiments.estimates import Experiment, first_orders, sum_per_example
from nicehooks.experiments.grids import Cell
from nicehooks.experiments.telling import Tell
from nicehooks.values import trees


def corrected(experiment: Experiment, tell: Tell) -> list[Tensor]:
    """The effect at each cell by AtP*; tells how many layers were left out."""
    bodies = bodies_of(experiment)
    moved = moved_attention(bodies[0], experiment)
    sites = list(
        dict.fromkeys([str(cell.stem) for cell in experiment.grid.cells] + [one.pattern for one in moved if one])
    )
    whole = _estimates(experiment, moved, _slopes_at_cells(experiment, sites))
    sizes, passes = [torch.zeros_like(one) for one in whole], [0] * len(whole)
    layers = [(body, layer) for body in bodies for layer in range(body.n_layers)]
    for done, (body, layer) in enumerate(layers, 1):
        outputs = [getattr(body, what)[layer] for what in ADDED if _has_part(body, what)]
        with edit(experiment.model, outputs, as_constant):
            gradients = _slopes_at_cells(experiment, sites)
        for at, estimate in enumerate(_estimates(experiment, moved, gradients)):
            sizes[at] += estimate.abs()
            passes[at] += _has_gradient(experiment.grid.cells[at], moved[at], gradients)
        tell(done, len(layers))
    return [one.sign() * size / max(count, 1) for one, size, count in zip(whole, sizes, passes, strict=True)]


ADDED = ("attn_out", "cross_attn_out", "mlp_out")
"""What a layer adds to the stream."""


def _has_part(body: Anatomy, what: str) -> bool:
    return hasattr(body, what) and not body.lacks(what)


def bodies_of(experiment: Experiment) -> list[Anatomy]:
    """The anatomy of the layers that the cells are in, and of those behind them.

    Raises:
        UnsupportedModule: the cells are in the encoder and in the decoder, or in none of them.
    """
    found = anatomy(experiment.model)
    if not isinstance(found, EncoderDecoder):
        return [found]
    sides = {"encoder": found.encoder, "decoder": found.decoder}
    names = [cell.path.plain_name for cell in experiment.grid.cells]
    own = [side for side, body in sides.items() if all([_is_in_layers(name, body) for name in names])]
    if not own:
        raise UnsupportedModule(NO_SIDE.format(kind=found.kind))
    return [found.decoder] if own == ["decoder"] else [found.encoder, found.decoder]


def _is_in_layers(name: str, body: Anatomy) -> bool:
    blocks = [body.name("block", layer) for layer in range(body.n_layers)]
    return any([f"{name}.".startswith(f"{block}.") for block in blocks])


NO_SIDE = (
    "attribute(…, method='atp*'): {kind} has an encoder and a decoder, and not all of these places are in the "
    "layers of one of them. Ask for those of one:\n"
    "    attribute(model, anatomy(model).decoder.z, …, method='atp*')"
)


def as_constant(value: Tensor) -> Tensor:
    """`value`, through which every gradient is zero; see NOTE [A layer left out]."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=value.device), value, value.detach())


def _slopes_at_cells(experiment: Experiment, sites: Sequence[str]) -> Mapping[str, Any]:
    return experiment.gradients_at(sites)


def _estimates(
    experiment: Experiment, moved: Sequence[MovedAttention | None], gradients: Mapping[str, Any]
) -> list[Tensor]:
    cells = experiment.grid.cells
    plain = iter(first_orders(experiment, [cells[at] for at, one in enumerate(moved) if one is None], gradients))
    return [
        next(plain)
        if one is None
        else sum_per_example([one.change * gradients[one.pattern][:, one.heads]], experiment.baseline)
        for one in moved
    ]


def _has_gradient(cell: Cell, moved: MovedAttention | None, gradients: Mapping[str, Any]) -> bool:
    if moved is not None:
        return bool(gradients[moved.pattern][:, moved.heads].any())
    whole = gradients.get(str(cell.stem))
    slopes = [] if whole is None else trees.leaves(trees.get(whole, cell.chain))
    return any([bool(slope.any()) for slope in slopes if isinstance(slope, Tensor)])


# --- queries and keys -------------------------------------------------------------------------------------------------


class MovedAttention(NamedTuple):
    """How the pattern of one attention changes with the query or key of one cell.

    Attributes:
        pattern: the path of the pattern.
        heads: those of the pattern that change.
        change: `[batch, head, query, key]`, of these heads.
    """

    pattern: str
    heads: list[int]
    change: Tensor


class _Projected(NamedTuple):
    """A cell that is part of the queries or the keys of a layer, and which of them, `[pos, head]`."""

    at: int
    layer: int
    cell: Cell
    touched: Tensor


def moved_attention(body: Anatomy, experiment: Experiment) -> list[MovedAttention | None]:
    """For each cell that is part of queries or keys, how attention changes with it; see NOTE [Queries and keys]."""
    moved: list[MovedAttention | None] = [None] * len(experiment.grid.cells)
    cells = {what: _projected(experiment, getattr(body, what)) for what in ("q", "k")}
    layers = sorted({one.layer for found in cells.values() for one in found})
    if not layers:
        return moved
    base = _scores(body, experiment, layers, {}, None)
    for what, found in cells.items():
        for together in _apart(found):
            changes = {
                str(one.cell.path): experiment.new_in(one.cell, experiment.stems[str(one.cell.stem)])
                for one in together
            }
            new = _scores(body, experiment, layers, changes, base)
            for one in together:
                moved[one.at] = _change_of(body, what, one, base, new)
    return moved


def _projected(experiment: Experiment, parts: Sequence[Part]) -> list[_Projected]:
    """The cells that are part of one of `parts`."""
    layers = {str(part): layer for layer, part in enumerate(parts)}
    size = len(parts[0].chain)
    found: list[_Projected] = []
    for at, cell in enumerate(experiment.grid.cells):
        layer = layers.get(str(replace(cell.path, chain=cell.path.chain[:size])))
        if layer is not None:
            known = size - len(cell.stem.chain)
            value = trees.get(experiment.stems[str(cell.stem)], cell.chain[:known])
            found.append(_Projected(at, layer, cell, _touched(value, cell.chain[known:])))
    return found


def _touched(value: Tensor, chain: Any) -> Tensor:
    """Which positions and heads, `[pos, head]`, the region at the end of `chain` has a part in."""
    pos, heads = value.shape[1:3]
    numbers = torch.arange(pos * heads, device=value.device).reshape(1, pos, heads, 1).expand(value.shape)
    mask = torch.zeros(pos * heads, dtype=torch.bool, device=value.device)
    mask[trees.get(numbers, chain).flatten()] = True
    return mask.reshape(pos, heads)


def _apart(found: Sequence[_Projected]) -> list[list[_Projected]]:
    """The cells, such that those of one round have no position of a head in common: they do not see each other."""
    rounds: list[tuple[dict[int, Tensor], list[_Projected]]] = []
    for one in found:
        free = next((r for r in rounds if not (one.layer in r[0] and (r[0][one.layer] & one.touched).any())), None)
        if free is None:
            rounds.append(free := ({}, []))
        free[0][one.layer] = one.touched | free[0].get(one.layer, torch.zeros_like(one.touched))
        free[1].append(one)
    return [cells for _, cells in rounds]


def _scores(
    body: Anatomy,
    experiment: Experiment,
    layers: Sequence[int],
    changes: Mapping[str, Any],
    base: ActivationCache | None,
) -> ActivationCache:
    """The scores of `layers`, and what their attention gives, where only the scores themselves may change."""
    kept = {} if base is None else {str(body.z[layer]): base[body.z[layer]] for layer in layers}
    wanted = [part for layer in layers for part in (body.scores[layer], body.z[layer])]
    values = {**changes, **kept}
    changed = patch(experiment.model, values) if values else nullcontext()
    with torch.no_grad(), changed, capture(experiment.model, wanted) as seen:
        experiment.run.output()
    return seen


def _change_of(
    body: Anatomy, what: str, one: _Projected, base: ActivationCache, new: ActivationCache
) -> MovedAttention:
    old, changed = base[body.scores[one.layer]].float(), new[body.scores[one.layer]].float()
    per_head = one.touched if what == "q" else one.touched.repeat_interleave(body.n_heads // body.n_kv_heads, 1)
    heads = per_head.any(0).nonzero().flatten().tolist()
    where = per_head.T[heads]  # [head, pos], of the queries or the keys
    where = where[..., None] if what == "q" else where[:, None]
    before, after = old[:, heads], torch.where(where, changed[:, heads], old[:, heads])
    change = (after.softmax(-1) - before.softmax(-1)).nan_to_num(0.0)  # a row that may see nothing has no softmax
    return MovedAttention(str(body.pattern[one.layer]), heads, change)
