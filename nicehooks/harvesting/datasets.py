"""A store as a dataset of `torch.utils.data`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from nicehooks.caches.arguments import BadArgument
from nicehooks.harvesting.parts import this_part
from nicehooks.harvesting.stored_rows import StoredRows

if TYPE_CHECKING:
    from nicehooks.harvesting.activation_store import ActivationStore


class StoreDataset(IterableDataset[StoredRows]):
    """The batches of a store, divided among the ranks of `torch.distributed` and the workers of a `DataLoader`.

    Each epoch of a shuffled one has an order of its own: `set_epoch(3)` chooses it.
    """

    def __init__(self, store: ActivationStore, size: int, options: dict[str, Any]) -> None:
        self.store = store
        self.size = size
        self.options: dict[str, Any] = {"rank": None, "world": None, "seed": 0, **options}
        self.epoch = 0
        if (self.options["rank"] is None) != (self.options["world"] is None):
            raise BadArgument(
                f"dataset(…): rank={self.options['rank']} and world={self.options['world']}: both, or none"
            )
        store.batches(size, **{name: value for name, value in self.options.items() if value is not None})

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass through the rows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[StoredRows]:
        options: dict[str, Any] = dict(self.options)
        rank, world = options.pop("rank"), options.pop("world")
        rank, world = this_part() if rank is None else (rank, world)
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        options["seed"] = f"{options['seed']} {self.epoch}" if self.epoch else options["seed"]
        return self.store.batches(self.size, rank=rank * workers + number, world=world * workers, **options)
