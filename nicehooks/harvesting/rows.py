"""The rows that a stream of batches gives: the model is run, and each value taken apart into tokens, or examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nicehooks.caches.arguments import BadArgument, whole_numbers
from nicehooks.caches.arithmetic import concatenated
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.user_functions import call_user, takes_site
from nicehooks.core.selection import Site, Where, select
from nicehooks.errors import TreeMismatch
from nicehooks.harvesting.alike import Alike
from nicehooks.harvesting.fingerprints import Digest
from nicehooks.harvesting.inputs import (
    Batch,
    BatchFault,
    batches_of,
    check_has_rows,
    check_keeps_positions,
    check_shape,
)
from nicehooks.harvesting.shards import DTYPES
from nicehooks.values import trees

Per = Literal["token", "example"]

PROVENANCE = {"sample": torch.int64, "position": torch.int32, "token": torch.int32}
"""What each row says of where it came from."""


@dataclass(frozen=True)
class Reached:
    """How far a stream was read.

    Attributes:
        batches: how many batches of this part.
        rows: how many rows they gave.
        digest: the fingerprint of these batches.
    """

    batches: int
    rows: int
    digest: str


@dataclass(frozen=True)
class Block:
    """The rows of one batch, without those that were skipped.

    Attributes:
        columns: a tensor `[row, …]` for each value, by the path of its place.
        origin: `sample` and, of tokens, `position` and `token`, each `[row]`.
        progress: how far the stream was read with this batch.
    """

    columns: dict[str, Tensor]
    origin: dict[str, Tensor]
    progress: Reached


@dataclass(frozen=True)
class Recipe:
    """What is taken from a model: where, and what becomes of it on the way.

    Attributes:
        model: any module.
        where: paths, sites, … (see `select`).
        per: what has a row: each `"token"`, or each `"example"`.
        map: reduces each value: `fn(value)` or `fn(value, site=…)`; of tokens `[row, …]`, of an example all it has.
        dtype: of floating values; None leaves them as they are.
        skip_tokens: tokens that give no rows.
    """

    model: nn.Module
    where: Where
    per: Per = "token"
    map: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None
    skip_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.per not in ("token", "example"):
            raise BadArgument(f"per={self.per!r}: it is 'token' or 'example'")
        if self.map is not None and not callable(self.map):
            raise BadArgument(f"map={self.map!r} is no function of a value")
        if self.dtype is not None and (self.dtype not in DTYPES or not self.dtype.is_floating_point):
            known = ", ".join(str(dtype) for dtype in DTYPES if dtype.is_floating_point)
            raise BadArgument(f"dtype={self.dtype!r}: floating values can be stored as {known}")
        object.__setattr__(self, "skip_tokens", whole_numbers(self.skip_tokens, "skip_tokens"))
        if self.skip_tokens and self.per == "example":
            raise BadArgument(f"skip_tokens={list(self.skip_tokens)}: with per='example' no token has a row")

    def places(self) -> dict[str, Site]:
        """The sites that are read, by their paths.

        Raises what can be said before the model runs: that it is none, that a site is not there or has no such rows.
        """
        if not isinstance(self.model, nn.Module):
            raise BadArgument(f"model is a {type(self.model).__name__}, and no nn.Module")
        found = {str(site): site for site in select(self.model, self.where)}
        for site in found.values():
            check_has_rows(site, self.per)
        return found

    def blocks(
        self, stream: Iterable[Any], part: tuple[int, int] = (0, 1), after: Reached | None = None
    ) -> Iterator[Block]:
        """The rows of the batches of `stream`; those that were there when it was read as far as `after` are skipped.

        Raises:
            OtherData: `after` is of another stream.
            TreeMismatch: a row of one batch is not what a row of another is.
        """
        sites = self.places()
        digest, done, count, alike = Digest(), 0, 0, Alike()
        for batch in batches_of(stream, part):
            digest.add(*batch.tensors, batch.samples)
            chosen = Chosen(batch, self)
            before, count = count, count + chosen.count
            done += 1
            if after is not None and done == after.batches and digest.text != after.digest:
                raise OtherData(done, after)
            if after is None or count > after.rows:
                skip = 0 if after is None else max(0, after.rows - before)
                reached = Reached(done, count, digest.text)
                yield alike.checked(batch.number, self._block(chosen, sites, skip, reached))
        if after is not None and done < after.batches:
            raise OtherData(done, after)

    def _block(self, chosen: Chosen, sites: dict[str, Site], skip: int, progress: Reached) -> Block:
        if not chosen.count:
            return Block({}, {}, progress)
        columns = {name: value[skip:] for name, value in self.columns(chosen, sites).items()}
        return Block(columns, {name: value[skip:] for name, value in chosen.origin().items()}, progress)

    def columns(self, chosen: Chosen, sites: dict[str, Site]) -> dict[str, Tensor]:
        """What the model computes for a batch at its `places`, row by row."""
        device = next((parameter.device for parameter in self.model.parameters() if not parameter.is_meta), None)
        with torch.no_grad(), capture(self.model, self.where, stop=True) as acts:
            chosen.batch.run(self.model, device)
        return {name: self._in_dtype(value, name) for name, value in self._leaves(acts, chosen, sites)}

    def _leaves(self, acts: ActivationCache, chosen: Chosen, sites: dict[str, Site]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of each value, by their paths."""
        told = self.map is not None and takes_site(self.map)
        for key, value in acts.items():
            if self.per == "token" and key in sites:
                check_keeps_positions(sites[key], value)
            taken = trees.map_tensors(lambda tensor, key=key, whole=value: chosen.rows_of(tensor, key, whole), value)
            leaves = list(tensors_in(self._mapped(taken, key, chosen, sites.get(key) if told else None), key))
            if not leaves:
                raise TreeMismatch(
                    f"{key!r}: {'the value' if self.map is None else 'what map gave'} has no tensor in it."
                )
            for path, leaf in leaves:
                found = len(leaf) if leaf.ndim else "no"
                if found != chosen.count:
                    raise TreeMismatch(f"{path!r}: map gave {found} rows for {chosen.count}; it has to keep them.")
                yield path, leaf

    def _mapped(self, taken: Any, key: str, chosen: Chosen, site: Site | None) -> Any:
        """What `map` makes of the rows: of all tokens at once, of each example without its padding."""
        fn: Any = self.map
        if fn is None:
            return taken
        if chosen.index is None:  # else these are copies; what `fn` does in place is no matter of another place
            taken = trees.map_tensors(torch.clone, taken)
        parts = [taken] if self.per == "token" else chosen.each_example(taken)
        done = [fn(part) if site is None else call_user(fn, True, part, key, site) for part in parts]
        return done[0] if len(done) == 1 else concatenated(done, 0, key)

    def _in_dtype(self, value: Tensor, path: str) -> Tensor:
        value = value.to(self.dtype) if self.dtype is not None and value.is_floating_point() else value
        if value.dtype not in DTYPES or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise TreeMismatch(NOT_STORABLE.format(path=path, kind=str(kind).removeprefix("torch.")))
        return value


class Chosen:
    """The places of a batch that give rows."""

    def __init__(self, batch: Batch, recipe: Recipe) -> None:
        self.batch = batch
        self.per = recipe.per
        self.mask = batch.mask
        self.keep = self._keep(recipe.skip_tokens) if recipe.per == "token" else None
        """Which tokens `[batch, pos]`; None where all."""
        self.index = None if self.keep is None else self.keep.flatten().nonzero().squeeze(1)
        known = batch.mask if batch.ids is None else batch.ids
        self._shape = None if known is None else (known.shape[0], known.shape[1])

    def _keep(self, skip: Sequence[int]) -> Tensor | None:
        keep = self.mask
        if skip and self.batch.ids is None:
            raise BatchFault(f"batch {self.batch.number} has no tokens [batch, pos], of which skip_tokens= names some.")
        if skip and self.batch.ids is not None:
            kept = ~torch.isin(self.batch.ids.cpu(), torch.tensor(list(skip)))
            keep = kept if keep is None else keep & kept
        return None if keep is None or bool(keep.all()) else keep

    @property
    def count(self) -> int:
        """How many rows there are; known without running the model."""
        if self.per == "example":
            return len(self.batch.samples)
        return int(self.index.numel()) if self.index is not None else self.shape[0] * self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """How many examples and positions there are."""
        if self._shape is None:
            first = self.batch.tensors[0]
            if first.ndim < 2:
                raise TreeMismatch(NO_TOKENS.format(shape=list(first.shape)))
            self._shape = (first.shape[0], first.shape[1])
        return self._shape

    def rows_of(self, value: Tensor, key: str, whole: Any) -> Tensor:
        """The rows of a value: `[batch, pos, …]` becomes `[row, …]`."""
        if self.per == "example":
            check_shape(value.shape, (len(self.batch.samples),), key, self.per, whole)
            return value
        check_shape(value.shape, self.shape, key, self.per, whole)
        flat = value.detach().flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))

    def each_example(self, taken: Any) -> list[Any]:
        """What each example has without its padding `[1, pos, …]`; all at once where nothing says what is padding."""
        mask = self.mask
        if mask is None:
            return [taken]
        return [trees.map_tensors(lambda t, i=i, mask=mask: _unpadded(t, i, mask), taken) for i in range(len(mask))]

    def origin(self) -> dict[str, Tensor]:
        """Where each row came from."""
        if self.per == "example":
            return {"sample": self.batch.samples}
        shape = self.shape
        mask = torch.ones(shape, dtype=torch.bool) if self.mask is None else self.mask
        found = {"sample": self.batch.samples[:, None].expand(shape), "position": mask.cumsum(1) - 1}
        if self.batch.ids is not None:
            found["token"] = self.batch.ids.cpu()
        flat = {name: value.to(PROVENANCE[name]).flatten() for name, value in found.items()}
        return flat if self.index is None else {name: value[self.index] for name, value in flat.items()}


def _unpadded(value: Tensor, example: int, mask: Tensor) -> Tensor:
    one = value[example : example + 1]
    return one[:, mask[example].to(one.device)] if value.shape[:2] == mask.shape else one


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, each with its path: `h.3`, or `h.3[0]` and `h.3['values']`."""
    if isinstance(value, Tensor):
        yield path, value
        return
    node = trees.open_node(value)
    if node is None and value is not None:
        raise TreeMismatch(
            f"{path!r} has a {type(value).__name__} in it, which has no rows; select the tensors beside it."
        )
    for entry, child in zip(node.entries, node.children, strict=True) if node is not None else ():
        yield from tensors_in(child, path + trees.show_step(entry))


class OtherData(TreeMismatch):
    """A stream is not the one that the store was begun with."""

    def __init__(self, done: int, after: Reached) -> None:
        ended = f"it ended after {done:,} of the {after.batches:,} batches that are in the store"
        differs = f"its first {after.batches:,} batches are not those that are in the store"
        more = f"it goes on after the {after.batches:,} batches that are in the store, which is complete"
        super().__init__(
            OTHER_DATA.format(why=ended if done < after.batches else more if done > after.batches else differs)
        )


OTHER_DATA = """\
harvest(…, resume=True) was given other data than the store was begun with: {why}.
  Give it the same batches, from the first one on, or another store."""

NOT_STORABLE = """\
{path!r} is {kind}, which no store holds.
    harvest(…, map=torch.view_as_real)  # of complex numbers; map=lambda value: value.float() of others"""

NO_TOKENS = """\
the batch has the shape {shape}: there are no positions in it that could have a row each.
    harvest(…, per="example")"""
