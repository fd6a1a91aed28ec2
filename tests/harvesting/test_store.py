"""The store: every row can be traced back, however it was padded, shuffled, divided and read."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pandas
import pytest
import torch
from gallery.prefix import WIDTH, PrefixModel
from harvest_streams import all_places, alone, check_rows, places_of, stream, texts
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nicehooks import ActivationStore, NiceHooksError, NotCaptured, TreeMismatch, capture, harvest, on_the_fly
from nicehooks.errors import PathError
from nicehooks.harvesting.inputs import BatchFault
from nicehooks.harvesting.shuffling import Shuffle

SAMPLES = texts(30)
KEYS = ["layers.1", "layers.3"]


@pytest.fixture(params=["left", "right", "both"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    return harvest(PrefixModel(), KEYS, stream(SAMPLES, side=request.param), tmp_path / "store", shard_rows=16)


# --- provenance -------------------------------------------------------------------------------------------------------


def test_every_token_has_one_row_and_padding_has_none(store: ActivationStore) -> None:
    assert len(store) == sum(map(len, SAMPLES))
    assert places_of(store.rows(slice(None))) == all_places(SAMPLES)


@pytest.mark.parametrize("key", KEYS)
def test_every_row_can_be_traced_back(store: ActivationStore, key: str) -> None:
    wanted = alone(PrefixModel(), SAMPLES, key)
    check_rows(store.rows(slice(None)), key, SAMPLES, wanted)
    for batch in store.batches(7, shuffle=True, seed=5):
        check_rows(batch, key, SAMPLES, wanted)


def test_the_shards_are_whole_and_full(store: ActivationStore, tmp_path: Path) -> None:
    assert [shard.rows for shard in store.manifest.shards[:-1]] == [16] * (len(store) // 16)
    store.check()
    for shard in store.manifest.shards:  # the format is what its name says
        with safe_open(tmp_path / "store" / shard.file, framework="pt") as opened:
            assert sorted(opened.keys()) == ["/position", "/sample", "/token", *KEYS]
            assert opened.get_tensor("layers.1").shape == (shard.rows, WIDTH)


def test_examples_have_numbers_of_ones_own(tmp_path: Path) -> None:
    batches = [
        {**batch, "sample": torch.arange(4)[: len(batch["input_ids"])] + 1000 * n}
        for n, batch in enumerate(stream(SAMPLES))
    ]
    store = harvest(PrefixModel(), KEYS, batches, tmp_path)
    assert sorted(set(store.sample[:].tolist()))[3:6] == [3, 1000, 1001]


@pytest.mark.parametrize("skipped", [[SAMPLES[0][0]], sorted({text[0] for text in SAMPLES})])
def test_tokens_that_are_skipped_give_no_rows(skipped: list[int], tmp_path: Path) -> None:
    store = harvest(PrefixModel(), KEYS, stream(SAMPLES, side="both"), tmp_path, skip_tokens=skipped)
    assert places_of(store.rows(slice(None))) == [
        (s, p) for s, p in all_places(SAMPLES) if SAMPLES[s][p] not in skipped
    ]
    check_rows(store.rows(slice(None)), "layers.3", SAMPLES, alone(PrefixModel(), SAMPLES, "layers.3"))


# --- the order of reading ---------------------------------------------------------------------------------------------


@given(count=st.integers(0, 3000), seed=st.integers())
def test_a_shuffle_is_a_permutation(count: int, seed: int) -> None:
    shuffled = Shuffle(count, seed)(torch.arange(count))
    assert torch.equal(shuffled.sort().values, torch.arange(count))


def test_a_shuffle_is_of_the_whole_and_looks_random() -> None:
    count = 100_000
    places = torch.arange(count)
    for seed in range(3):
        shuffled = Shuffle(count, seed)(places)
        assert abs(torch.corrcoef(torch.stack([places, shuffled]).double())[0, 1]) < 0.02
        moved = (shuffled[1:] - shuffled[:-1]).abs().double().mean() / count
        assert abs(moved - 1 / 3) < 0.01  # the mean distance of two places that have nothing to do with each other
        hits = torch.histc(shuffled[:1000].double(), bins=10, min=0, max=count)
        assert ((hits - 100).square() / 100).sum() < 35  # chi squared with 9 degrees of freedom
    assert (Shuffle(count, 0)(places) == Shuffle(count, 1)(places)).sum() < 20


def test_each_row_comes_once_in_an_epoch_and_another_seed_is_another_order(store: ActivationStore) -> None:
    orders = [
        [place for batch in store.batches(7, shuffle=True, seed=seed) for place in places_of(batch)]
        for seed in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == all_places(SAMPLES)


@pytest.mark.parametrize("shuffle", [False, True])
def test_readers_have_no_row_in_common(store: ActivationStore, shuffle: bool) -> None:
    parts = [
        [p for b in store.batches(5, shuffle=shuffle, rank=rank, world=3) for p in places_of(b)] for rank in range(3)
    ]
    assert sorted(chain(*parts)) == all_places(SAMPLES)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_workers_of_a_loader_divide_the_rows(store: ActivationStore, workers: int) -> None:
    dataset = store.dataset(5, shuffle=True)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        rows = [(place, batch["layers.1"].clone()) for batch in loader for place in places_of(batch)]
        orders.append([place for place, _ in rows])
    assert sorted(orders[0]) == sorted(orders[1]) == all_places(SAMPLES)
    assert orders[0] != orders[1]


def test_reading_goes_on_in_the_middle(store: ActivationStore) -> None:
    every = [places_of(batch) for batch in store.batches(7, shuffle=True)]
    assert [places_of(batch) for batch in store.batches(7, shuffle=True, start=3)] == every[3:]
    assert len(list(store.batches(7, drop_last=True))) == len(store) // 7


def test_on_the_fly_gives_the_same_rows(tmp_path: Path) -> None:
    batches = stream(SAMPLES, side="both")
    wanted = alone(PrefixModel(), SAMPLES, "layers.3")
    for buffer in (8, 20, 1000):
        rows = list(on_the_fly(PrefixModel(), KEYS, batches, buffer, size=8))
        assert {len(batch.sample) for batch in rows[:-1]} == {8}
        assert sorted(place for batch in rows for place in places_of(batch)) == all_places(SAMPLES)
        assert [place for batch in rows for place in places_of(batch)] != all_places(SAMPLES)
        for batch in rows:
            check_rows(batch, "layers.3", SAMPLES, wanted)


# --- subscripts and views ---------------------------------------------------------------------------------------------

INDICES = [
    slice(None),
    slice(3, 40),
    slice(-5, None),
    slice(40, 3),
    slice(0, 50, 7),
    slice(30, 2, -3),
    0,
    -1,
    [3, 50, 3],
    ...,
    (slice(2, 30), 0),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_subscript_is_what_it_is_on_a_tensor(store: ActivationStore, index: object) -> None:
    column = store["layers.3"]
    whole = torch.cat(alone(PrefixModel(), SAMPLES, "layers.3"))
    assert (column.shape, column.dtype, len(column)) == (whole.shape, whole.dtype, len(whole))
    if isinstance(index, slice) and (index.step or 1) < 0:
        wanted = whole[list(range(*index.indices(len(whole))))]
    else:
        wanted = whole[index]
    torch.testing.assert_close(column[index], wanted, atol=1e-5, rtol=1e-5)


def test_a_mask_and_a_tensor_of_any_shape_are_subscripts(store: ActivationStore) -> None:
    whole = store["layers.3"][:]
    rows = torch.tensor([[3, -1], [40, 0]])
    assert torch.equal(store["layers.3"][rows], whole[rows])
    assert torch.equal(store["layers.3"][store.position[:] == 0], whole[store.position[:] == 0])


@pytest.mark.parametrize("index", [1000, -1000, [0, 1000]])
def test_a_row_that_is_not_there(store: ActivationStore, index: object) -> None:
    with pytest.raises(TreeMismatch, match="the rows of this store go from 0 to"):
        store["layers.3"][index]


def test_what_is_read_can_be_changed_and_is_never_written_back(store: ActivationStore) -> None:
    before = store["layers.3"][0:4].clone()
    for batch in store.batches(4):
        batch["layers.3"].zero_()
    assert torch.equal(store["layers.3"][0:4], before)
    store["layers.3"][0:4].zero_()
    assert torch.equal(ActivationStore(store.there)["layers.3"][0:4], before)
    ActivationStore(store.there).check()


def test_any_spelling_finds_a_place(tmp_path: Path) -> None:
    store = harvest(PrefixModel(), ["layers.1[:,  :, :3]", "layers.0@input[0]"], stream(SAMPLES), tmp_path)
    assert store.sites == ["layers.0@input[0]", "layers.1[:, :, :3]"]
    assert store["layers.1[:, :,:3]"].shape == (len(store), 3)
    assert next(store.batches(2))["layers.1[:,:,:3]"].shape == (2, 3)
    assert "layers.1[:,:,:3]" in store and "layers.1" not in store
    with pytest.raises(
        NotCaptured, match=r"'layers.1' is not in this store, which has .*\n    store\['layers.1\[:, :, :3\]'\]"
    ):
        store["layers.1"]
    with pytest.raises(PathError):
        store["layers.1["]


def test_trees_have_a_column_for_each_tensor(tmp_path: Path) -> None:
    store = harvest(PrefixModel(), "pair", stream(SAMPLES), tmp_path)
    assert store.sites == ["pair[0]", "pair[1]['twice']"]
    assert torch.equal(store["pair[1]['twice']"][:], 2 * store["pair[0]"][:])


def test_a_data_frame_and_an_arrow_table(store: ActivationStore) -> None:
    rows = store.rows([0, 5, 9])
    frame = store.to_pandas([0, 5, 9])
    assert isinstance(frame, pandas.DataFrame)
    assert frame["token"].tolist() == rows.token.tolist()
    assert frame[("layers.3", 4)].tolist() == rows["layers.3"][:, 4].tolist()
    table = store.to_arrow([0, 5, 9], ["layers.3"])
    assert table.column_names == ["sample", "position", "token", "layers.3"]
    assert table["layers.3"].to_pylist() == rows["layers.3"].tolist()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_any_dtype_is_stored_and_read(dtype: torch.dtype, tmp_path: Path) -> None:
    store = harvest(PrefixModel(), KEYS, stream(SAMPLES), tmp_path, dtype=dtype, shard_rows=16)
    wanted = torch.cat(alone(PrefixModel(), SAMPLES, "layers.3")).to(dtype)
    for got in (store["layers.3"][:], store.rows(slice(None))["layers.3"]):
        assert got.dtype == dtype
        assert (got.float() - wanted.float()).abs().max() <= 0.26 * wanted.float().abs().max() * torch.finfo(
            dtype
        ).eps + 1e-5
    assert (
        next(iter(on_the_fly(PrefixModel(), KEYS, stream(SAMPLES), 50, size=9, dtype=dtype)))["layers.3"].dtype == dtype
    )
    assert store.to_pandas().shape == (len(store), 3 + 2 * WIDTH)


# --- what is taken ----------------------------------------------------------------------------------------------------


def top(value: Tensor) -> dict[str, Tensor]:
    values, indices = value.topk(2)
    return {"values": values, "indices": indices}


def test_map_keeps_the_largest_of_each_row(tmp_path: Path) -> None:
    store = harvest(PrefixModel(), "layers.3", stream(SAMPLES, side="left"), tmp_path, map=top, dtype=torch.bfloat16)
    whole = torch.cat(alone(PrefixModel(), SAMPLES, "layers.3"))
    assert store.sites == ["layers.3['values']", "layers.3['indices']"]
    assert torch.equal(store["layers.3['indices']"][:], whole.topk(2).indices)
    assert store["layers.3['values']"].dtype == torch.bfloat16
    assert store.manifest.map == "top"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_over_the_positions_of_each_example_leaves_out_its_padding(side: str, tmp_path: Path) -> None:
    store = harvest(
        PrefixModel(), "layers.3", stream(SAMPLES, side=side), tmp_path, per="example", map=lambda v: v.mean(1)
    )
    wanted = torch.stack([one.mean(0) for one in alone(PrefixModel(), SAMPLES, "layers.3")])
    torch.testing.assert_close(store["layers.3"][:], wanted)
    assert store.sample[:].tolist() == list(range(30))
    with pytest.raises(NotCaptured):
        _ = store.token


def test_map_is_told_the_site(tmp_path: Path) -> None:
    encoders = {"layers.1": nn.Linear(WIDTH, 2), "layers.3": nn.Linear(WIDTH, 5)}
    store = harvest(PrefixModel(), KEYS, stream(SAMPLES), tmp_path, map=lambda value, site: encoders[str(site)](value))
    assert [store[key].shape[1] for key in KEYS] == [2, 5]


def test_the_forward_ends_after_the_last_place(tmp_path: Path) -> None:
    model = PrefixModel()
    harvest(model, "layers.1", stream(SAMPLES), tmp_path)
    assert model.last == 0
    ran: list[int] = []
    model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    harvest(model, "layers.1", stream(SAMPLES), tmp_path / "more")
    assert ran == []


def test_plain_modules_and_tensors(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.randn(10, 2)
    for name, batches in {"list": list(x.split(4)), "loader": DataLoader(TensorDataset(x), batch_size=4)}.items():
        store = harvest(model, "0", batches, tmp_path / name, per="example")
        torch.testing.assert_close(store["0"][:], model[0](x).detach())


def test_a_context_around_it_acts(tmp_path: Path) -> None:
    from nicehooks import ablate

    model = PrefixModel()
    with ablate(model, "layers.0"), capture(model, "embed"):
        store = harvest(model, "layers.0", stream(SAMPLES), tmp_path)
    assert store.manifest.under == ["ablate(model, 'layers.0', …)"]
    assert store["layers.0"][:].abs().max() == 0


def test_an_address_of_fsspec(tmp_path: Path) -> None:
    batches = stream(SAMPLES, side="both")
    here = harvest(PrefixModel(), KEYS, batches, tmp_path / "here", shard_rows=16)
    there = harvest(PrefixModel(), KEYS, batches, "memory://harvested/store", shard_rows=16)
    assert len(ActivationStore("memory://harvested/store")) == len(here)
    for a, b in zip(here.batches(9, shuffle=True), there.batches(9, shuffle=True), strict=True):
        assert torch.equal(a["layers.3"], b["layers.3"]) and places_of(a) == places_of(b)
    assert torch.equal(there["layers.1"][10:40], here["layers.1"][10:40])
    there.check()


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    (stream(SAMPLES)[0], BatchFault, "batches is one dict, and should be an iterable of batches"),
    ([], BatchFault, "there are no batches"),
    ([3], BatchFault, "batch 0 is a int"),
    ([{**stream(SAMPLES)[0], "sample": torch.arange(3)}], BatchFault, r"'sample' has the shape \[3\], not \[4\]"),
    ([{**stream(SAMPLES)[0], "attention_mask": torch.ones(4)}], BatchFault, "attention_mask is no tensor"),
]


@pytest.mark.parametrize(("batches", "error", "says"), REFUSED, ids=[says[:20] for *_, says in REFUSED])
def test_what_is_no_stream_of_batches(batches: object, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        harvest(PrefixModel(), KEYS, batches, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_value_without_a_row_for_each_token(tmp_path: Path) -> None:
    with pytest.raises(TreeMismatch) as error:
        harvest(PrefixModel(), "layers.1[:, -1]", stream(SAMPLES)[:1], tmp_path)
    assert str(error.value) == (
        "'layers.1[:, -1]' takes one of its positions, so it has no row for each token.\n"
        '    harvest(…, per="example")  # a row for each example'
    )
    with pytest.raises(TreeMismatch) as error:
        harvest(torch.nn.Flatten(0, 1), "", [torch.ones(4, 9, 8)], tmp_path)
    assert str(error.value) == (
        "'' has the shape [36, 8], but a row for each token takes a value [4, 9, …].\n"
        '    harvest(model, "/rows", …)  # all positions of all examples are one dimension'
    )
    with pytest.raises(TreeMismatch) as error:
        harvest(torch.nn.Linear(5, 3), "", [torch.ones(4, 5)], tmp_path)
    assert str(error.value) == (
        "'' has the shape [4, 3], but a row for each token takes a value [4, 5, …].\n"
        '    harvest(…, per="example")  # a row for each example'
    )


def test_map_has_to_keep_the_rows(tmp_path: Path) -> None:
    with pytest.raises(TreeMismatch, match="map gave 1 rows for"):
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, map=lambda value: value[:1])


def test_settings_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="per='row'"):
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, per="row")
    with pytest.raises(NiceHooksError, match="there is no engine 'spark'"):
        harvest(PrefixModel(), "layers.1", stream(SAMPLES), tmp_path, engine="spark")
