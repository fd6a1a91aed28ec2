"""`Effects`: its numbers, labels and tables, what is written and read, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from nicehooks import ActivationCache, NiceHooksError, TreeMismatch
from nicehooks.errors import FileFault, FileMissing
from nicehooks.experiments.effects import Axis, Effect, Effects, is_grid
from nicehooks.extras import MissingExtra

AXES = [Axis("layer", ("0", "1")), Axis("position", ("the", "cat", "the"))]
EXAMPLES = torch.tensor([[[0.0, 2.0], [1.0, 3.0], [0.5, 0.5]], [[-4.0, -2.0], [0.0, 0.0], [1.0, 2.0]]])
SITES = [f"h.{layer}[:, {position}]" for layer in range(2) for position in range(3)]


def effects() -> Effects:
    return Effects(EXAMPLES.mean(-1), AXES, torch.tensor([5.0, 7.0]), SITES, EXAMPLES, ["By the loop."])


def test_values_axes_and_what_follows_from_them() -> None:
    grid = effects()
    assert torch.equal(grid.values, torch.tensor([[1.0, 2.0, 0.5], [-3.0, 0.0, 1.5]]))
    assert grid.axes == tuple(AXES) and grid.axes[1].labels[2] == "the"
    assert torch.equal(grid.metrics, grid.values + 6)
    assert grid.spread is not None and torch.equal(grid.spread, EXAMPLES.std(-1))
    assert repr(grid) == "Effects(layer 2 × position 3, from -3 to 2, baseline 6)"


def test_one_number_for_all_examples_has_no_spread() -> None:
    alone = Effects(torch.zeros(2), AXES[:1], torch.tensor(1.0))
    assert alone.spread is None and alone.sites == ("", "")
    assert Effects(torch.zeros(2), AXES[:1], torch.tensor(1.0), examples=torch.zeros(2, 1)).spread is None


def test_a_grid_has_a_label_for_each_cell() -> None:
    with pytest.raises(TreeMismatch, match=r"^a grid of \(2, 3\) cells cannot hold effects of shape \(3, 2\)\.$"):
        Effects(torch.zeros(3, 2), AXES, torch.tensor(0.0))


def test_top_is_the_largest_of_either_sign() -> None:
    assert effects().top(3) == [
        Effect("h.1[:, 0]", ("1", "the"), -3.0),
        Effect("h.0[:, 1]", ("0", "cat"), 2.0),
        Effect("h.1[:, 2]", ("1", "the"), 1.5),
    ]
    assert len(effects().top(100)) == len(effects().cells()) == 6
    assert effects().cells()[1] == Effect("h.0[:, 1]", ("0", "cat"), 2.0)


def test_what_is_not_done_comes_last_and_is_left_out_of_the_summary() -> None:
    grid = Effects(torch.tensor([float("nan"), 0.5]), AXES[:1], torch.tensor(0.0))
    assert [cell.labels for cell in grid.top()] == [("1",), ("0",)]
    assert repr(grid) == "Effects(layer 2, from 0.5 to 0.5, baseline 0)"
    assert repr(Effects(torch.zeros(0), [Axis("layer", ())], torch.tensor(0.0))) == "Effects(layer 0, no cells)"
    assert repr(Effects(torch.tensor(1.0), [], torch.tensor(0.0))) == "Effects(one, from 1 to 1, baseline 0)"


def test_normalized_is_in_parts_of_the_way_from_corrupted_to_clean() -> None:
    grid = effects().normalized(clean=torch.tensor([9.0, 11.0]), corrupted=6.0)
    assert torch.equal(grid.values, effects().values / 4)
    assert torch.equal(grid.baseline, torch.tensor([-0.25, 0.25]))  # its mean, the corrupted run, is 0
    assert grid.examples is not None and torch.equal(grid.examples, EXAMPLES / 4)
    assert (grid.axes, grid.sites, grid.notes) == (tuple(AXES), tuple(SITES), ("By the loop.",))


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (2.0, "the metric is 2 clean and corrupted: there is no way between to measure on."),
        (float("nan"), "normalized(…, clean=nan): the metric of this run is NaN, so there is no way to measure on."),
    ],
)
def test_no_way_to_measure_on(clean: float, message: str) -> None:
    with pytest.raises(NiceHooksError, match=f"^{re.escape(message)}$"):
        effects().normalized(clean, 2.0)


def test_a_table_has_a_row_for_each_cell() -> None:
    table = effects().to_pandas()
    assert list(table.columns) == ["layer", "position", "effect", "spread", "site"]
    assert table["layer"].tolist() == ["0"] * 3 + ["1"] * 3
    assert table["position"].tolist() == ["the", "cat", "the"] * 2
    assert table["effect"].tolist() == effects().values.flatten().tolist()
    assert table["spread"].tolist() == pytest.approx(EXAMPLES.std(-1).flatten().tolist())
    assert table["site"].tolist() == SITES
    assert "spread" not in Effects(torch.zeros(2), AXES[:1], torch.tensor(1.0)).to_pandas()


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=re.escape('pip install "nicehooks[pandas]"')):
        effects().to_pandas()


@pytest.mark.parametrize("grid", [effects(), Effects(torch.zeros(2), AXES[:1], torch.tensor(1.0))])
def test_what_is_saved_is_loaded(grid: Effects, tmp_path: Path) -> None:
    grid.save(tmp_path / "grid.safetensors")
    again = Effects.load(tmp_path / "grid.safetensors")
    assert torch.equal(again.values, grid.values) and torch.equal(again.baseline, grid.baseline)
    assert (again.axes, again.sites, again.notes) == (grid.axes, grid.sites, grid.notes)
    assert isinstance(again.axes[0], Axis)
    assert (again.examples is None) == (grid.examples is None)
    assert grid.examples is None or torch.equal(again.examples, grid.examples)  # type: ignore[arg-type]


def test_files_that_hold_no_effects(tmp_path: Path) -> None:
    ActivationCache({"h.0": torch.zeros(1)}).save(tmp_path / "acts")
    ActivationCache({"labels": "1", "values": torch.zeros(1)}).save(tmp_path / "labels")
    for name in ("acts", "labels"):
        with pytest.raises(FileFault, match=r"cannot be read: it holds no effects\. Effects\.save writes them\.$"):
            Effects.load(tmp_path / name)
    with pytest.raises(FileMissing):
        Effects.load(tmp_path / "nothing")
    with pytest.raises(FileFault):
        effects().save(tmp_path / "missing" / "grid")


def test_labels_that_fill_a_grid() -> None:
    assert is_grid([("0", "a"), ("1", "b"), ("1", "a"), ("0", "b")])
    assert not is_grid([("0", "a"), ("0", "b"), ("1", "a")])
    assert not is_grid([("0", "a"), ("0", "a")])


def test_effects_are_drawn_with_their_labels() -> None:
    axes = effects().plot(title="what was found")
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("position", "layer", "what was found")
    assert axes.images[0].get_array().tolist() == effects().values.tolist()
    assert len(Effects(torch.zeros(2, 2, 3), [AXES[0], *AXES], torch.tensor(0.0)).plot()) == 2


def test_effects_are_a_page_and_show_themselves_in_a_notebook(tmp_path: Path) -> None:
    text = effects().to_html(tmp_path / "grid.html", "what was found").read_text()
    assert "<title>what was found</title>" in text
    assert '"values":[1.0,2.0,0.5,-3.0,0.0,1.5]' in text and '"h.1[:, 2]"' in text
    assert '"notes":["layer 2 × position 3, from -3 to 2, baseline 6","By the loop."]' in text
    assert effects()._repr_html_().startswith('<iframe title="effects" srcdoc="&lt;!doctype html&gt;')
