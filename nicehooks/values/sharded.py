"""Tensors that are spread over processes: a plain value laid out as they are, and they brought together.

NOTE [Whole values and shards]
Where a `DTensor` stands, a plain tensor is the whole value, the same on every process: of it, each process puts its own
shard there, and none asks another one. So the code of one process is right on every rank. Where a plain tensor stands,
nothing says whether it is a shard, and what is given is what stands there on this process.

A subscript into a dimension that is split would be of the shard. There the value is brought together first, which is
a message to the others, and what was written is laid out again as it was. Sums that are yet to be made (`Partial`) are
made before anything is written into them.

`torch.distributed` is imported where a value that it has made comes by, and not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nicehooks.errors import ContextMisuse, TreeMismatch
from nicehooks.values import regions
from nicehooks.values.nodes import leaves, structure_of
from nicehooks.values.regions import Heads, Rows, read_plain
from nicehooks.values.whole import map_tensors


def is_distributed(value: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(value, Tensor) and hasattr(type(value), "device_mesh") and hasattr(type(value), "placements")


def gathered(value: Any) -> Tensor:
    """The whole of a tensor that is spread, on every process; all of them have to ask for it. A plain one as it is.

    Raises:
        ContextMisuse: the others did not come, for as long as the timeout of their group lasts, or are gone.
    """
    if not is_distributed(value):
        return value
    try:
        return value.full_tensor()
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0]
        raise ContextMisuse(NOT_GATHERED.format(what=structure_of(value), said=said)) from error


NOT_GATHERED = (
    "{what} is spread over processes, and they did not all come to gather it. Enter the same contexts on every rank, "
    "in the same order, and run the same forward; and see whether another rank has raised.\n"
    "    torch.distributed.init_process_group(…, timeout=timedelta(minutes=1))  # how long a rank waits\n"
    "  torch: {said}"
)


def beside(value: Tensor, old: Any) -> Tensor:
    """`value` in a form that torch takes together with `old`: where that is spread, as a whole on each process."""
    return _on_each(value, old) if is_distributed(old) and not is_distributed(value) else value


def laid_out_as(value: Any, old: Any) -> Any:
    """`value`, which has the shape of `old`, spread as `old` is; see NOTE [Whole values and shards]."""
    if not is_distributed(old):
        return gathered(value)
    if not is_distributed(value) or value.device_mesh != old.device_mesh:
        value = _on_each(gathered(value), old)
    return value if value.placements == old.placements else value.redistribute(placements=_summed_placements(old))


def misfit_of_shards(value: Tensor, old: Any) -> TreeMismatch:
    """Why `value`, a plain tensor, is not the whole of `old`, which is spread."""
    mine = list(old.to_local().shape)
    return TreeMismatch(NOT_WHOLE.format(new=structure_of(value), old=structure_of(old), mine=mine))


NOT_WHOLE = (
    "{new} does not broadcast to {old}, a DTensor, of which this process holds {mine}: a plain tensor is taken as the "
    "whole value. Of a shard, torch.distributed.tensor.DTensor.from_local(shard, mesh, placements) is the value"
)


def _summed(value: Any) -> Any:
    """`value`, but where it is what an embedding whose rows are spread gives: the sum of that over the processes.

    Such a value shares a list of the rows that it lacks with those of other calls. torch takes it from there when it
    makes the sum, which has to be once: neither twice, for the model and for a cache, nor never, for what was replaced.
    """
    masked = any([hasattr(placement, "mask_buffer") for placement in value.placements])
    return value.redistribute(placements=_summed_placements(value)) if masked else value


def _on_each(value: Tensor, old: Any) -> Any:
    """`value` as a `DTensor` that every process of the mesh of `old` has the whole of."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = old.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _summed_placements(spread: Any) -> list[Any]:
    """The placements of `spread`, with whole values where sums are yet to be made."""
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in spread.placements]


class PlainIsWhole(torch.overrides.TorchFunctionMode):
    """Inside it, a plain tensor goes into a function of torch beside a `DTensor` as a whole one; gradients come back.

    `torch.distributed.tensor.experimental.implicit_replication` is for forwards alone: backward would run outside.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        tensors = [leaf for leaf in leaves(given) if isinstance(leaf, Tensor)]
        spread = [tensor for tensor in tensors if is_distributed(tensor)]
        if 0 < len(spread) < len(tensors):
            given = map_tensors(lambda tensor: beside(tensor, spread[0]), given)
        return func(*given[0], **given[1])


# --- parts ------------------------------------------------------------------------------------------------------------


def _read_spread(tensor: Any, step: Any) -> Tensor:
    return _on_each(read_plain(gathered(tensor), step), tensor) if _splits(tensor, step) else read_plain(tensor, step)


def _write_spread(base: Any, step: Any, new: Any) -> Tensor:
    """What torch writes into a `DTensor` has no gradient (2.13), so each process writes into what it has."""
    if _splits(base, step):
        return laid_out_as(regions.write_unchecked(gathered(base), step, gathered(new)), base)
    from torch.distributed.tensor import DTensor

    base = base.redistribute(placements=_summed_placements(base))
    new = laid_out_as(new, read_plain(base, step))
    mine = regions.write_unchecked(base.to_local(), step, new.to_local())
    mesh, placements = base.device_mesh, base.placements
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=base.shape, stride=base.stride())


def _splits(tensor: Any, step: Any) -> bool:
    """Whether `step` leads into a dimension of which each process has a part, or picks indices, as no shard can."""
    parts = _parts_by_dimension(tensor)
    if isinstance(step, Heads):
        return step.count % parts[-1] > 0 if parts else False
    if isinstance(step, Rows):
        return parts[0] > 1 if parts else False
    items = [item for item in regions.by_dimension(tensor, step) if item is not None]
    picked = any([isinstance(item, list) for item in items])
    return picked or any([count > 1 and item != slice(None) for count, item in zip(parts, items, strict=False)])


def _parts_by_dimension(tensor: Any) -> list[int]:
    """Into how many parts each dimension is split."""
    parts = [1] * tensor.ndim
    for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
        if hasattr(placement, "dim"):
            parts[placement.dim] *= size
    return parts


regions.KINDS.insert(0, (is_distributed, _read_spread, _write_spread, lambda value, may_write: _summed(value)))
