"""What has no row for each token, or not the same as the others, is refused: in a store, and on the fly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery.architectures import gpt2, tokens
from gallery.prefix import PrefixModel
from harvest_streams import stream, texts

from nicehooks import anatomy, harvest, on_the_fly
from nicehooks.caches.arguments import BadArgument
from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.harvesting.inputs import BatchFault

SAMPLES = texts(12)
BATCHES = stream(SAMPLES)


def to_a_store(folder: Path, model: Any, where: Any, batches: Any, **more: Any) -> Any:
    return harvest(model, where, batches, folder / "store", **more)


def by_the_way(folder: Path, model: Any, where: Any, batches: Any, **more: Any) -> Any:
    return list(on_the_fly(model, where, batches, **more))


BOTH = pytest.mark.parametrize("write", [to_a_store, by_the_way])


def changing(first: Callable[[Any], Any], later: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that does another thing from its second call on."""
    calls: list[int] = []

    def fn(value: Any) -> Any:
        calls.append(1)
        return (first if len(calls) == 1 else later)(value)

    return fn


def same(value: Any) -> Any:
    return value


UNLIKE = {
    "one that would be spread": (same, lambda value: value[:, :1]),
    "another width": (same, lambda value: value[:, :3]),
    "another dtype": (lambda value: value.half(), same),
    "whole numbers": (lambda value: value.long(), same),
    "one fewer": (lambda value: {"a": value, "b": value}, lambda value: {"a": value}),
    "one more": (lambda value: {"a": value}, lambda value: {"a": value, "b": value}),
    "another name": (lambda value: {"a": value}, lambda value: {"b": value}),
}


@BOTH
@pytest.mark.parametrize("name", UNLIKE)
def test_rows_that_change_from_batch_to_batch_are_refused(write: Any, name: str, tmp_path: Path) -> None:
    """What is not written would be what the memory held before; what is too small would be spread."""
    with pytest.raises(TreeMismatch, match="the rows of batch 1 are not what those before it are"):
        write(tmp_path, PrefixModel(), "layers.1", BATCHES, map=changing(*UNLIKE[name]))


@BOTH
@pytest.mark.parametrize("length", [1, 3])
def test_examples_of_other_lengths_are_refused(write: Any, length: int, tmp_path: Path) -> None:
    batches = [torch.ones(2, 5, dtype=torch.int64), torch.ones(2, length, dtype=torch.int64)]
    with pytest.raises(TreeMismatch) as error:
        write(tmp_path, PrefixModel(), "layers.1", batches, per="example")
    assert str(error.value).splitlines()[1:3] == [
        "  before:  layers.1 [5, 8] float32",
        f"  now:     layers.1 [{length}, 8] float32",
    ]


@BOTH
@pytest.mark.parametrize("nothing", [None, {}, []])
@pytest.mark.parametrize("first", [True, False])
def test_a_map_that_gives_nothing_is_refused(write: Any, nothing: Any, first: bool, tmp_path: Path) -> None:
    fn = (lambda value: nothing) if first else changing(same, lambda value: nothing)
    with pytest.raises(TreeMismatch, match=r"'layers\.1': what map gave has no tensor in it"):
        write(tmp_path, PrefixModel(), "layers.1", BATCHES, map=fn)


@BOTH
@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda value: value.to(torch.complex64), "is complex64, which no store holds"),
        (lambda value: value.abs().to(torch.uint32), "is uint32, which no store holds"),
        (lambda value: value.to_sparse(), "is sparse_coo, which no store holds"),
        (lambda value: value.mean(), "map gave no rows for"),
    ],
)
def test_values_that_would_be_stored_as_something_else(write: Any, fn: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(TreeMismatch, match=says):
        write(tmp_path, PrefixModel(), "layers.1", BATCHES, map=fn)


@BOTH
def test_places_without_such_rows_however_long_the_texts_are(write: Any, tmp_path: Path) -> None:
    """Also where there are as many positions as heads, or as the value is wide."""
    model = gpt2().eval()
    parts, path = anatomy(model), "transformer.h.1"
    for length in (2, 4, 7, 32):
        batch = [tokens(3)[:, :1].expand(3, length)]
        for part in (parts.pattern[1], parts.scores[1]):
            with pytest.raises(TreeMismatch, match=r"is \[batch, head, pos, …\]: it has no row for each token"):
                write(tmp_path, model, part, batch)
        with pytest.raises(TreeMismatch, match="takes one of its positions"):
            write(tmp_path, model, f"{path}[:, -1]", batch)
        for per in ("token", "example"):
            with pytest.raises(TreeMismatch, match=f"is a parameter: it has no row for each {per}"):
                write(tmp_path, model, "transformer.wpe@weight", batch, per=per)


def test_one_head_of_a_pattern_has_a_row_for_each_token(tmp_path: Path) -> None:
    model = gpt2().eval()
    pattern = anatomy(model).pattern[1]
    store = harvest(model, [f"{pattern}[:, 1]", "transformer.h.1[..., :3]"], [tokens(3)], tmp_path)
    assert [store[site].shape[1:] for site in store.sites] == [(tokens(3).shape[1],), (3,)]


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.int8}, "dtype=torch.int8: floating values can be stored as torch.float64"),
    ({"dtype": torch.complex64}, "dtype=torch.complex64"),
    ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
    ({"skip_tokens": [1.5]}, "skip_tokens=.*whole numbers"),
    ({"skip_tokens": 3}, "skip_tokens=3"),
    ({"skip_tokens": [3], "per": "example"}, "with per='example' no token has a row"),
    ({"map": 3}, "map=3 is no function"),
    ({"part": (2, 2)}, r"part=\(2, 2\)"),
    ({"part": (0, 0)}, r"part=\(0, 0\)"),
    ({"part": 3}, "part=3"),
]


@BOTH
@pytest.mark.parametrize(("setting", "says"), SETTINGS, ids=[says[:24] for _, says in SETTINGS])
def test_settings_that_make_no_sense(write: Any, setting: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=says):
        write(tmp_path, PrefixModel(), "layers.1", BATCHES, **setting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [0, -3, 2.5, "7", True])
def test_a_shard_has_a_row_at_least(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"shard_rows=.*: it is a whole number, 1 or more"):
        harvest(PrefixModel(), "layers.1", BATCHES, tmp_path / "store", shard_rows=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [None, "", 3, "foo://x", "s3:///"])
def test_a_place_that_is_none(place: Any) -> None:
    with pytest.raises(BadArgument, match="is no place for a store"):
        harvest(PrefixModel(), "layers.1", BATCHES, place)


@pytest.mark.parametrize("given", [{"size": 0}, {"size": -1}, {"buffer": 0}, {"size": 2.5}, {"seed": None}])
def test_on_the_fly_says_so_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(BadArgument):
        on_the_fly(PrefixModel(), "layers.1", BATCHES, **given)
    with pytest.raises(NiceHooksError):
        on_the_fly(PrefixModel(), "layers.9", BATCHES)
    with pytest.raises(BatchFault):
        on_the_fly(PrefixModel(), "layers.1", BATCHES[0])


BATCH_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.ones(4, 2)}, r"attention_mask has the shape \[4, 2\], and the tokens \[4, 9\]"),
    ({"attention_mask": torch.ones(2, 9)}, r"attention_mask has the shape \[2, 9\]"),
    ({"sample": torch.tensor([0.5, 1, 2, 3])}, "'sample' has float32s in it"),
    ({"sample": torch.ones(4, dtype=torch.bool)}, "'sample' has bools in it"),
]


@pytest.mark.parametrize(("entry", "says"), BATCH_FAULTS, ids=[says[:20] for _, says in BATCH_FAULTS])
def test_entries_that_do_not_fit_the_tokens(entry: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BatchFault, match=says):
        harvest(PrefixModel(), "layers.1", [{**BATCHES[0], **entry}], tmp_path)


def test_the_tokens_say_how_many_examples_there_are(tmp_path: Path) -> None:
    """Whatever else comes before them in a batch: a temperature for all of them, say."""
    model = PrefixModel()
    model.embed.register_forward_pre_hook(lambda module, args: args)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "temperature"}), with_kwargs=True
    )
    batches = [{"temperature": torch.tensor([2.0]), **batch} for batch in BATCHES]
    store = harvest(model, "layers.1", batches, tmp_path)
    assert store.sample[:].unique().tolist() == list(range(len(SAMPLES)))


@BOTH
@pytest.mark.parametrize("per", ["token", "example"])
def test_a_map_in_place_changes_nothing_else(write: Any, per: Any, tmp_path: Path) -> None:
    """Neither what another place has, which may be the same tensor, nor what the user has given."""
    model, x = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()), torch.ones(2, 5, 3)
    found = write(tmp_path, model, ["@input[0]", "0", "1@input[0]"], [x], map=lambda value: value.mul_(2), per=per)
    rows = found.rows(slice(None)) if write is to_a_store else found[0]
    assert all((rows[site] == 2).all() for site in rows) and (x == 1).all()


def test_tokens_to_skip_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(BatchFault, match="batch 0 has no tokens"):
        harvest(torch.nn.Linear(3, 2), "", [torch.ones(2, 4, 3)], tmp_path, skip_tokens=[0])
