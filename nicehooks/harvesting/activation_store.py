"""`ActivationStore`: activations in a directory, a row for each token, read by place or in a random order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nicehooks.caches.arguments import BadArgument, whole_number
from nicehooks.errors import NotCaptured, PathError, TreeMismatch
from nicehooks.harvesting.addresses import Address, address
from nicehooks.harvesting.manifest import Manifest, ShardRecord
from nicehooks.harvesting.row_indices import rows_meant, run_meant
from nicehooks.harvesting.shard_files import ShardFiles
from nicehooks.harvesting.shuffling import order_of
from nicehooks.harvesting.stored_rows import StoredRows, named
from nicehooks.harvesting.writing import ORIGIN, record_of, shards_of

if TYPE_CHECKING:
    from nicehooks.harvesting.datasets import StoreDataset


class StoredColumn:
    """One place of a store: a tensor `[row, …]` that is on the disk. A subscript reads it, `column[:]` all of it.

    Rows of one local shard that follow each other are not copied, but mapped from its file. Writing into them changes
    nothing on the disk, only what this store gives from then on.
    """

    def __init__(self, files: ShardFiles, name: str) -> None:
        self._files = files
        self._name = name
        self.dtype = files.columns[name].dtype
        self.shape = torch.Size((files.rows, *files.columns[name].shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is None or first is Ellipsis or isinstance(first, bool) or (getattr(first, "ndim", 1) > 1 and rest):
            return self._inside(self[:], index)
        rows, local = self._rows(first)
        if rest:
            return self._inside(rows, (local, *rest))
        return rows if isinstance(local, slice) else rows.reshape((*local.shape, *self.shape[1:]))

    def _rows(self, index: Any) -> tuple[Tensor, Any]:
        """The rows at `index`, one after the other; and which of these `index` means, in its own shape."""
        run = run_meant(index, len(self)) if isinstance(index, slice) else None
        if run is not None:
            return self._files.part(self._name, *run), slice(None)
        rows = rows_meant(index, len(self))
        found = self._files.gather([self._name], rows.reshape(-1))[0]
        return found, slice(None) if isinstance(index, slice) else torch.arange(rows.numel()).reshape(rows.shape)

    def _inside(self, rows: Tensor, index: Any) -> Tensor:
        try:
            return rows[index]
        except (IndexError, TypeError) as error:
            raise TreeMismatch(f"{self!r} cannot be read by {index!r}: {error}.") from None

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self), AT_ONCE):
            yield from self[first : first + AT_ONCE]

    def __repr__(self) -> str:
        return f"StoredColumn({self._name.removeprefix(ORIGIN)!r}, {list(self.shape)}, {str(self.dtype)[6:]})"


class ActivationStore:
    """Activations that `harvest` has written: `len(store)` rows, at each place of which there is a tensor.

        store = ActivationStore("activations")
        store["h.3"][100:200]                                  # [100, d_model], mapped from the disk
        for batch in store.batches(4096, shuffle=True, seed=0):
            batch["h.3"], batch.sample, batch.position, batch.token

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import harvest
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> store = harvest(model, "0", [torch.ones(4, 2), torch.zeros(3, 2)], "rows", per="example")
    >>> store
    ActivationStore('rows'): 7 rows, complete
      0  [3] float32
    >>> store.sample[[0, 5]].tolist(), [len(batch.sample) for batch in store.batches(4, shuffle=True)]
    ([0, 5], [4, 3])

    Args:
        where: its directory, or the address of it that `fsspec` knows.

    Attributes:
        manifest: what the store says of itself: `fingerprint`, `columns`, `shards`, `complete`, …

    Raises:
        FileMissing: there is no store.
        FileFault: its manifest is damaged.
    """

    def __init__(self, where: Any) -> None:
        self.there: Address = where if hasattr(where, "publish") else address(where)
        self.manifest = Manifest.load(self.there)

    # what is there

    @property
    def sites(self) -> list[str]:
        """The paths of its places."""
        return list(self.manifest.columns)

    @cached_property
    def files(self) -> ShardFiles:
        """Its shards."""
        records = self.manifest.shards if self.manifest.complete else self._so_far()
        origin = {ORIGIN + name: column for name, column in self.manifest.origin.items()}
        return ShardFiles(self.there, records, {**self.manifest.columns, **origin})

    def _so_far(self) -> list[ShardRecord]:
        """The shards of a store that is not complete."""
        sizes = self.there.names()
        every = [file for part in range(self.manifest.parts) for file in shards_of(self.there, part)]
        return [record_of(self.there, file, sizes[file])[0] for file in every]

    def __len__(self) -> int:
        return self.files.rows

    def __bool__(self) -> bool:
        return True  # a store without rows is a store

    __iter__ = None  # of rows or of places? `batches` and `sites` say which

    def __contains__(self, path: object) -> bool:
        try:
            return bool(named(path, self.sites))
        except (NotCaptured, PathError):
            return False

    def __getitem__(self, path: Any) -> StoredColumn:
        return StoredColumn(self.files, named(path, self.sites))

    @property
    def sample(self) -> StoredColumn:
        """The example that each row came from."""
        return StoredColumn(self.files, ORIGIN + "sample")

    @property
    def position(self) -> StoredColumn:
        """The position of each row among the tokens of its example."""
        return StoredColumn(self.files, ORIGIN + named("position", list(self.manifest.origin)))

    @property
    def token(self) -> StoredColumn:
        """The token of each row."""
        return StoredColumn(self.files, ORIGIN + named("token", list(self.manifest.origin)))

    def check(self) -> None:
        """Reads all of it, and compares the checksums.

        Raises:
            FileFault: a shard is damaged.
        """
        self.files.check()

    # reading

    def rows(self, index: Any, sites: Sequence[str] | None = None) -> StoredRows:
        """The rows at `index`: a slice, or numbers, or a truth value for each row; one number gives one row.

        Raises:
            TreeMismatch: there are no such rows.
        """
        rows = rows_meant(index, len(self))
        if rows.ndim > 1:
            raise TreeMismatch(f"rows are read by a list of numbers, and not by numbers {list(rows.shape)}.")
        keys, origin = self._keys(sites), list(self.manifest.origin)
        found = self.files.gather([*keys, *(ORIGIN + name for name in origin)], rows.reshape(-1))
        return StoredRows.of(dict(zip(keys, found, strict=False)), dict(zip(origin, found[len(keys) :], strict=True)))

    def _keys(self, sites: Sequence[str] | None) -> list[str]:
        chosen = [sites] if isinstance(sites, str) else sites
        return self.sites if chosen is None else [named(path, self.sites) for path in chosen]

    def batches(
        self,
        size: int,
        *,
        shuffle: bool = False,
        seed: int | str = 0,
        sites: Sequence[str] | None = None,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[StoredRows]:
        """The rows in batches, in their order or in a random one over the whole store.

        Args:
            size: how many rows a batch has; the last one may have fewer.
            shuffle: a random order of all rows, which takes no memory: see `Shuffle`.
            seed: which one; another for each epoch.
            sites: only these places.
            rank: which of several readers this is; no two have a row in common.
            world: how many readers there are.
            drop_last: leaves out a last batch that is smaller.
            start: the number of the batch to begin with, to go on in the middle.

        Raises:
            BadArgument: a number makes no sense; at once, and not with the first batch.
            NotCaptured: a place is not there.
        """
        size, start = whole_number(size, "size", 1), whole_number(start, "start", 0)
        if whole_number(rank, "rank", 0) >= whole_number(world, "world", 1):
            raise BadArgument(f"rank={rank} of world={world}: they are numbered from 0")
        order = partial(order_of, len(self), shuffle, seed, (rank, world), size)
        return self._batches(order, size if drop_last else 1, self._keys(sites), not shuffle and world == 1, start)

    def _batches(
        self, order: Callable[[int], Tensor], least: int, keys: list[str], runs: bool, start: int
    ) -> Iterator[StoredRows]:
        while len(rows := order(start)) >= least:
            yield self._run(int(rows[0]), len(rows), keys) if runs else self.rows(rows, keys)
            start += 1

    def _run(self, first: int, count: int, keys: list[str]) -> StoredRows:
        """Rows that follow each other, copied: whoever writes into a batch changes no later one."""
        columns = {key: self.files.part(key, first, first + count).clone() for key in keys}
        origin = {name: self.files.part(ORIGIN + name, first, first + count).clone() for name in self.manifest.origin}
        return StoredRows.of(columns, origin)

    def dataset(self, size: int, **options: Any) -> StoreDataset:
        """The same batches as a `torch.utils.data` dataset, which divides them among the workers of a `DataLoader`.

        loader = DataLoader(store.dataset(4096, shuffle=True), batch_size=None, num_workers=4)
        """
        from nicehooks.harvesting.datasets import StoreDataset

        return StoreDataset(self, size, options)

    def to_arrow(self, rows: Any = slice(None), sites: Sequence[str] | None = None) -> Any:
        """Rows as a `pyarrow.Table`: `sample`, `position`, `token`, and a list of fixed size for each place."""
        from nicehooks.harvesting.frames import arrow_table

        return arrow_table(self.rows(rows, sites))

    def to_pandas(self, rows: Any = slice(None), sites: Sequence[str] | None = None) -> Any:
        """Rows as a `pandas.DataFrame`; a place of more than one number has a column for each: `("h.3", 17)`."""
        from nicehooks.harvesting.frames import data_frame

        return data_frame(self.rows(rows, sites))

    def __repr__(self) -> str:
        state = "complete" if self.manifest.complete else "not complete"
        lines = [f"  {name}  {list(c.shape)} {str(c.dtype)[6:]}" for name, c in self.manifest.columns.items()]
        return "\n".join([f"ActivationStore({self.there.full('').rstrip('/')!r}): {len(self):,} rows, {state}", *lines])

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationStore, (self.there,)  # files that are open do not travel


AT_ONCE = 1024
"""How many rows are read at once by whoever goes through them one by one."""
