"""`harvest`: writes what a model computes for a stream of batches into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from nicehooks.caches.arguments import BadArgument, whole_number
from nicehooks.core.selection import Where
from nicehooks.errors import FileFault
from nicehooks.harvesting.activation_store import ActivationStore
from nicehooks.harvesting.addresses import Address, address
from nicehooks.harvesting.inputs import BatchFault, check_stream
from nicehooks.harvesting.manifest import NAME, Manifest, ShardRecord, StoreMismatch
from nicehooks.harvesting.parts import done_name, finish_part, part_of, put_together, this_part, what_was_done
from nicehooks.harvesting.rows import OtherData, Per, Reached, Recipe
from nicehooks.harvesting.starting import THERE, Format, format_of, format_of_first, manifest_for
from nicehooks.harvesting.writing import Writer, clean, model_of, record_of, remove_shards, shards_of


def harvest(
    model: nn.Module,
    where: Where,
    batches: Iterable[Any],
    store: Any,
    *,
    per: Per = "token",
    map: Callable[..., Any] | None = None,
    dtype: torch.dtype | None = None,
    skip_tokens: Sequence[int] = (),
    shard_rows: int | None = None,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    engine: str = "here",
    progress: Callable[[int], Any] | None = None,
    **more: Any,
) -> ActivationStore:
    """Writes the activations of a stream of batches into a store: a row for each token, or for each example.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 8), nn.Linear(8, 50))
    >>> ids = torch.tensor([[3, 7, 9, 0], [5, 2, 0, 0]])
    >>> store = harvest(model, "1", [ids, ids + 1], "activations", skip_tokens=[0])
    >>> len(store), store["1"][:2].shape
    (13, torch.Size([2, 8]))
    >>> store.sample[:5].tolist(), store.position[:5].tolist(), store.token[:5].tolist()
    ([0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [3, 7, 9, 5, 2])

    Each forward ends after the last site that is asked for. A row knows the number of its example in the stream, its
    position among the tokens of the example, and its token; padding gives no row. After a kill, whenever it came,
    `resume=True` goes on where the last whole shard ends, without losing or repeating a row: see NOTE [A shard is there
    or it is not].

    Args:
        model: any module, in the mode that it is in; with `engine="ray"` also a function that makes it.
        where: paths, sites, … (see `select`).
        batches: an iterable of what the model is called with: dicts of tensors (`input_ids` and `attention_mask`, say),
            or single tensors. The entry `"sample"` of a dict, if there is one, gives the examples numbers of one's own.
            With `engine="ray"` also a Ray dataset.
        store: a directory, or an address that `fsspec` knows.
        per: what has a row: `"token"`, for values `[batch, pos, …]`, or `"example"`, for values `[batch, …]`.
        map: reduces each value before it is stored: `fn(value)` or `fn(value, site=…)`. Of tokens it gets the rows
            `[row, …]`, of examples one after the other without its padding `[1, pos, …]`, or, where nothing says what
            is padding, all at once. It returns a tensor, or several in a dict, with as many rows.
        dtype: what floating values are stored as, `torch.bfloat16` for example; as they are where it is left out.
        skip_tokens: tokens that give no rows, the first one of each text, say.
        shard_rows: how many rows a shard has; where it is left out, as many as make about 128 MB.
        resume: goes on with a store that is there; without, one that is there is an error.
        part: which part of the batches this process takes, and of how many; where it is left out, its rank under
            `torch.distributed`, or all of them.
        engine: `"here"`, or `"ray"` for a cluster.
        progress: called with the number of rows that are done, after each batch.
        more: what the engine takes besides: see `nicehooks.harvesting.ray_engine`.

    Returns:
        The store. Where another process writes another part, it may not be complete yet.

    Raises:
        SiteNotFound: `where` selects nothing.
        TreeMismatch: a value has no row for each token, or each example.
        StoreMismatch: `store` was begun with another model, other data or other settings.
        FileFault: there is a store already, one of its files is damaged, or the disk is full.
        BatchFault: one of the batches is none, or there is none.
        BadArgument: an argument makes no sense.
    """
    recipe = Recipe(model, where, per, map, dtype, skip_tokens)
    there = address(store)
    if progress is not None and not callable(progress):
        raise BadArgument(f"progress={progress!r} is no function of a number of rows")
    if engine == "ray":
        from nicehooks.harvesting.ray_engine import harvest_with_ray

        return harvest_with_ray(recipe, batches, store, resume, progress, **more)
    if engine != "here" or more:
        raise BadArgument(
            f"harvest(…): there is no engine {engine!r} that takes {sorted(more)}; it is 'here' or 'ray'."
        )
    if shard_rows is not None:
        shard_rows = whole_number(shard_rows, "shard_rows", 1)
    recipe.places()  # raises what it can before anything is there
    check_stream(batches)
    job = Job(recipe, there, *(this_part() if part is None else part_of(part)))
    return job.run(batches, shard_rows, resume, progress)


class Job(NamedTuple):
    """One part of a harvest, in this process."""

    recipe: Recipe
    there: Address
    part: int
    parts: int

    def run(
        self, batches: Iterable[Any], shard_rows: int | None, resume: bool, progress: Callable[[int], Any] | None
    ) -> ActivationStore:
        """Writes this part."""
        begun = self._begun(resume)
        clean(self.there, self.part)
        if begun is not None:  # before the model runs for long
            self._manifest(Format(begun.columns, begun.origin), shard_rows, begun)
        done = None if begun is None else self._done(begun)
        shards, after = self._already_there(done[0] if done and done[0] else None) if resume else ([], None)
        if begun is not None and done is not None:
            if done[0] == shards or not begun.data:  # those of Ray have other names
                self._same(batches, begun, shard_rows, done[1])
                if not begun.complete:
                    put_together(self.there, begun, self.part)
                return ActivationStore(self.there)
            begun = self._reopened(begun)
        if begun is None and shards:  # somebody took the manifest away
            batches, found = self._format(batches)
            begun = None if found is None else self._manifest(found, shard_rows, None)
            if begun is not None and model_of(self.there, shards[-1].file) not in (None, begun.fingerprint):
                self.there.remove(NAME)
                raise StoreMismatch(f"{self.there.full(shards[-1].file)!r} has the activations of another model.")
        writer = None if begun is None else self._writer(begun, shards, after)
        try:
            for block in self.recipe.blocks(batches, (self.part, self.parts), after):
                if block.columns and (writer is None or not writer.checked):
                    manifest = self._manifest(format_of(block.columns, block.origin), shard_rows, begun)
                    writer = writer or self._writer(manifest, shards, after)
                    writer.checked = True
                if writer is not None:
                    writer.add(block)
                if progress is not None:
                    progress(block.progress.rows)
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
        return self._finished(writer)

    def _done(self, begun: Manifest) -> tuple[list[ShardRecord], Reached | None] | None:
        """What this part has written and read, if it is done."""
        if done_name(self.part) in self.there.names():
            return what_was_done(self.there, self.part)
        if not begun.complete:
            return None
        end = Reached(begun.batches, begun.rows, begun.data[0]) if begun.parts == 1 and begun.data else None
        return [shard for shard in begun.shards if shard.file.startswith(f"{self.part:05}-")], end

    def _same(self, batches: Iterable[Any], begun: Manifest, shard_rows: int | None, end: Reached | None) -> None:
        """Raises where this would not give what is there; the data is read, and the model runs on one batch."""
        batches, found = self._format(batches)
        if found is not None:
            self._manifest(found, shard_rows, begun)
        if end is not None:
            for block in self.recipe.blocks(batches, (self.part, self.parts), end):
                raise OtherData(block.progress.batches, end)

    def _reopened(self, begun: Manifest) -> Manifest:
        """The manifest of a store of which a shard has gone since it was done."""
        begun = begun.reopened()
        begun.save(self.there, self.part)
        self.there.remove(done_name(self.part))
        return begun

    def _format(self, batches: Iterable[Any]) -> tuple[Iterable[Any], Format | None]:
        """What a row is, as the first batch of this part says; and all batches. None where that one has no rows."""
        stream, first = iter(batches), []
        for given in stream:
            first.append(given)
            if len(first) > self.part:
                return chain(first, stream), format_of_first(self.recipe, given)
        return first, None

    def _manifest(self, found: Format, shard_rows: int | None, begun: Manifest | None) -> Manifest:
        """The manifest of the store, which is written if nobody has begun it."""
        wanted = shard_rows if begun is None or shard_rows is not None else begun.shard_rows
        manifest = manifest_for(self.recipe, found, wanted, self.parts)
        if begun is not None:
            begun.check_same(manifest, self.there.full("").rstrip("/"))
        elif NAME in self.there.names():  # another process has begun it meanwhile
            if self.parts == 1:
                raise FileFault(THERE.format(where=self.there.full("").rstrip("/"), state="was begun meanwhile"))
            Manifest.load(self.there).check_same(manifest, self.there.full("").rstrip("/"))
        else:
            manifest.save(self.there, self.part)
        return manifest

    def _writer(self, manifest: Manifest, shards: list[ShardRecord], after: Reached | None) -> Writer:
        remove_shards(self.there, self.part, len(shards))
        return Writer(self.there, manifest, self.part, shards, after)

    def _finished(self, writer: Writer | None) -> ActivationStore:
        """The store, once this part is written."""
        shards, progress = ([], None) if writer is None else (writer.close(), writer.progress)
        if writer is None and self.parts == 1:
            raise BatchFault(NO_ROWS)
        if writer is None and NAME not in self.there.names():
            raise BatchFault(f"part {self.part} of {self.parts}: {NO_ROWS}")
        manifest = Manifest.load(self.there) if writer is None else writer.manifest
        finish_part(self.there, manifest, self.part, shards, progress)
        return ActivationStore(self.there)

    def _begun(self, resume: bool) -> Manifest | None:
        """The manifest that is there."""
        if NAME not in self.there.names():
            if not resume and shards_of(self.there, self.part):
                raise FileFault(
                    THERE.format(where=self.there.full("").rstrip("/"), state="has no manifest.json any more")
                )
            return None
        found = Manifest.load(self.there)
        mine = [name for name in self.there.names() if name.startswith(f"{self.part:05}")]
        if not resume and (found.complete or self.parts == 1 or mine):  # else another part has begun the store
            state = "is complete" if found.complete else "was begun"
            raise FileFault(THERE.format(where=self.there.full("").rstrip("/"), state=state))
        return found

    def _already_there(self, said: list[ShardRecord] | None) -> tuple[list[ShardRecord], Reached | None]:
        """The shards that an earlier run has written, and how far it had read; up to one that is not as it `said`."""
        names, found, last = self.there.names(), [], None
        for number, file in enumerate(shards_of(self.there, self.part)):
            record, reached = record_of(self.there, file, names[file])
            if said is not None and said[number : number + 1] != [record]:
                break
            if reached.rows != record.rows + (last.rows if last else 0):
                raise FileFault(f"{self.there.full(file)!r} is not the shard that comes after the one before it.")
            found.append(record)
            last = reached
        return found, last


NO_ROWS = "there are no batches, or nothing but padding in them: there is not one row to write."
