"""A subscript of a store reads what the same subscript of a tensor reads, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gallery.prefix import PrefixModel
from harvest_streams import stream, texts
from torch.utils.data import DataLoader

from nicehooks import ActivationStore, TreeMismatch, harvest
from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import NotCaptured

SAMPLES = texts(12)
COUNT = sum(map(len, SAMPLES))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store")
    return harvest(PrefixModel(), "layers.1", stream(SAMPLES), folder / "s", shard_rows=7, dtype=torch.float64)


MASK = torch.arange(COUNT) % 3 == 0
ROWS: list[Any] = [
    *[
        slice(*cut)
        for cut in [(None,), (2, 5), (5, 2), (None, None, 3), (20, 2, -3), (2, 5, -1), (5, 2, 2), (-4, None)]
    ],
    *[slice(30, 10**9), slice(3, 3)],
    *[[5, 7, 5], [-1, 0], [], [[1, 2], [3, -4]], torch.tensor([1, 2], dtype=torch.int32), range(3, 9)],
    *[MASK, MASK.tolist(), MASK.numpy(), torch.tensor([2]).numpy()],
]
INSIDE: list[Any] = [
    3,
    -1,
    torch.tensor(3),
    (3, 1),
    (slice(2, 5), 1),
    ([1, 2], slice(0, 2)),
    ([1, 2], [0, 1]),
    ...,
    (..., 0),
    (3, ..., 0),
    None,
    (None, 2),
    (MASK, 0),
    ([[1, 2]], 0),
    (slice(None, None, -1), [1, 0]),
]


def read_by(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """As numpy reads it, which knows steps below zero."""
    index = list(index) if isinstance(index, range) else index
    return torch.as_tensor(tensor.numpy()[index if not isinstance(index, list) or index else slice(0, 0)].copy())


@pytest.mark.parametrize("index", [*ROWS, *INSIDE], ids=[str(i) for i in range(len(ROWS) + len(INSIDE))])
def test_as_a_tensor_is_read(index: Any, store: ActivationStore) -> None:
    torch.testing.assert_close(store["layers.1"][index], read_by(store["layers.1"][:].clone(), index), rtol=0, atol=0)
    if not isinstance(index, tuple):  # a row of one number
        torch.testing.assert_close(store.position[index], read_by(store.position[:].clone(), index))


@pytest.mark.parametrize("index", ROWS, ids=[str(i) for i in range(len(ROWS))])
def test_rows_are_read_by_the_same(index: Any, store: ActivationStore) -> None:
    if getattr(torch.as_tensor(index if isinstance(index, list) else 0), "ndim", 0) > 1:
        return
    rows, wanted = store.rows(index), store["layers.1"][index]
    assert torch.equal(rows["layers.1"], wanted) and torch.equal(rows.sample, store.sample[index])
    assert store.to_pandas(index).shape == (len(wanted), 11) and store.to_arrow(index).num_rows == len(wanted)


REFUSED: list[Any] = [
    torch.ones(5, dtype=torch.bool),
    torch.ones(COUNT + 1, dtype=torch.bool),
    [True, False],
    1.5,
    [1.0, 2.0],
    "a",
    COUNT,
    -COUNT - 1,
    [0, COUNT],
    slice(None, None, 0),
    slice(0.0, 3.0),
    {1: 2},
    [None],
]


@pytest.mark.parametrize("index", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_means_no_rows(index: Any, store: ActivationStore) -> None:
    for read in (store["layers.1"].__getitem__, store.rows):
        with pytest.raises(TreeMismatch):
            read(index)


def test_what_is_not_inside_of_a_row(store: ActivationStore) -> None:
    with pytest.raises(TreeMismatch, match="cannot be read by"):
        store["layers.1"][3, 99]


def test_a_column_is_gone_through_row_by_row(store: ActivationStore) -> None:
    assert torch.equal(torch.stack(list(store["layers.1"])), store["layers.1"][:])


BATCHES: list[dict[str, Any]] = [{"size": size} for size in (0, -1, 2.5, "3", True)] + [
    {"size": 4, **more} for more in ({"start": -1}, {"start": 1.5}, {"rank": 2, "world": 2}, {"world": 0})
]


@pytest.mark.parametrize("given", BATCHES, ids=str)
def test_batches_say_at_once_what_is_wrong(given: dict[str, Any], store: ActivationStore) -> None:
    for make in (store.batches, store.dataset):
        with pytest.raises(BadArgument):
            make(**given)


def test_what_else_batches_say_at_once(store: ActivationStore) -> None:
    with pytest.raises(NotCaptured):
        store.batches(4, sites=["layers.9"])
    with pytest.raises(BadArgument, match="both, or none"):
        store.dataset(4, rank=1)
    assert [len(batch.sample) for batch in store.batches(10**15)] == [COUNT]


@pytest.mark.parametrize("world", [1, 2, 3, 50])
@pytest.mark.parametrize("size", [1, 7, COUNT, COUNT + 1])
def test_every_row_goes_to_one_reader(world: int, size: int, store: ActivationStore) -> None:
    for shuffle in (False, True):
        read = [store.batches(size, shuffle=shuffle, rank=rank, world=world) for rank in range(world)]
        found = torch.cat([batch.sample * 100 + batch.position for reader in read for batch in reader])
        assert found.sort().values.tolist() == (store.sample[:] * 100 + store.position[:]).sort().values.tolist()


def test_workers_share_the_rows_of_each_epoch(store: ActivationStore) -> None:
    data = store.dataset(4, shuffle=True)
    epochs: list[list[int]] = []
    for epoch in range(2):
        data.set_epoch(epoch)
        loader = DataLoader(data, batch_size=None, num_workers=2)
        epochs.append([n for batch in loader for n in (batch.sample * 100 + batch.position).tolist()])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == COUNT
