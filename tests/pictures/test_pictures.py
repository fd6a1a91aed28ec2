"""Pages and figures without a browser: what is in them, and what is refused."""

from __future__ import annotations

import base64
import html
import json
import re
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nicehooks import ActivationCache, ablate, attention_view, describe, sites
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.errors import FileMissing, NiceHooksError, NotCaptured, TreeMismatch
from nicehooks.pictures.graphs import graph_view
from nicehooks.pictures.grids import grid_view
from nicehooks.pictures.pages import Page
from nicehooks.pictures.plots import plot_grid

LAYERS, POSITIONS = ("layer", ["0", "1"]), ("position", ["the", "$y$", "cat"])


# --- pages ------------------------------------------------------------------------------------------------------------


def data_of(page: Page) -> Any:
    """The data of a page, as its script reads them."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.document(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_page_names_nothing_elsewhere() -> None:
    """`http` would be an address; the browser, too, is told to load nothing."""
    for page in (grid_view(torch.zeros(2), [LAYERS]), graph_view({"a": 0}, [])):
        assert "default-src 'none'" in page.document()
        assert re.findall(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", page.document())) == []


def test_no_text_ends_the_script_that_it_is_in() -> None:
    page = Page("<i>", "grid", ["</script><!--", "\u2028"])
    assert page.document().count("</script>") == 2
    assert data_of(page) == ["</script><!--", "\u2028"]
    assert "<title>&lt;i&gt;</title>" in page.document()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match=r"^cannot write '.*missing/page.html': there is no directory '.*missing'\.$"):
        grid_view(torch.zeros(2), [LAYERS]).to_html(tmp_path / "missing" / "page.html")
    assert grid_view(torch.zeros(2), [LAYERS]).to_html(str(tmp_path / "page.html")) == tmp_path / "page.html"


def test_a_notebook_gets_the_whole_page_in_a_frame() -> None:
    page = grid_view(torch.zeros(2), [LAYERS], "a 'grid'")
    found = re.fullmatch(
        r'<iframe title="a &#x27;grid&#x27;" srcdoc="([^"]*)" style="[^"]*"></iframe>', page._repr_html_()
    )
    assert found and html.unescape(found[1]) == page.document()


# --- grids ------------------------------------------------------------------------------------------------------------


def test_the_two_longest_axes_are_rows_and_columns() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    axes = [("strength", "ab"), ("layer", "012"), ("head", "0123")]
    data = data_of(grid_view(values, axes, spread=values / 100, sites=[f"s{index}" for index in range(24)]))
    assert [axis["name"] for axis in data["axes"]] == ["layer", "head", "strength"]
    assert data["values"] == values.permute(1, 2, 0).flatten().tolist()
    assert data["spread"] == pytest.approx([value / 100 for value in data["values"]])
    assert data["sites"] == [f"s{value:.0f}" for value in data["values"]]


def test_of_a_long_axis_the_largest_are_shown() -> None:
    values = torch.zeros(2, 1000)
    values[1, 990], values[0, 5], values[0, 6] = -3.0, 2.0, float("nan")
    data = data_of(grid_view(values, [LAYERS, ("neuron", [str(index) for index in range(1000)])]))
    labels = data["axes"][1]["labels"]
    assert len(labels) == 400 and {"5", "990"} <= set(labels) and "6" not in labels
    assert labels == sorted(labels, key=int)
    assert data["values"][400 + labels.index("990")] == -3.0
    assert data["notes"] == ["Of 1000 along the axis 'neuron', the 400 with the largest values are shown."]


def test_numbers_that_json_has_no_word_for_are_none() -> None:
    data = data_of(grid_view(torch.tensor([float("nan"), float("inf"), 1 / 3]), [("a", "xyz")]))
    assert data["values"] == [None, None, 0.333333]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1, 1, 1)])
def test_grids_of_any_shape_have_a_page_and_a_figure(shape: tuple[int, ...]) -> None:
    axes = [(f"axis {index}", [str(one) for one in range(size)]) for index, size in enumerate(shape)]
    assert len(data_of(grid_view(torch.zeros(shape), axes))["values"]) == torch.zeros(shape).numel()
    plot_grid(torch.zeros(shape), axes).figure.canvas.draw()


# --- figures ----------------------------------------------------------------------------------------------------------


def labels_of(axis: Any) -> list[str]:
    return [tick.label1.get_text() for tick in axis.get_major_ticks()]


def test_a_heat_map_has_its_labels_as_they_are_and_its_colours_around_0() -> None:
    values = torch.tensor([[0.0, 0.5, -0.25], [0.0, 0.0, float("nan")]])
    axes = plot_grid(values, [LAYERS, POSITIONS], title="a $title$")
    assert (labels_of(axes.yaxis), labels_of(axes.xaxis)) == (["0", "1"], ["the", "$y$", "cat"])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("position", "layer", "a $title$")
    assert not any(label.get_parse_math() for label in [*axes.get_xticklabels(), axes.title])
    assert axes.images[0].get_clim() == (-0.5, 0.5)
    assert torch.equal(torch.as_tensor(axes.images[0].get_array().filled(9.0)), values.nan_to_num(9.0).double())
    axes.figure.canvas.draw()


def test_one_axis_is_bars_with_their_spread() -> None:
    axes = plot_grid(torch.tensor([1.0, -2.0, 0.5]), [POSITIONS], spread=torch.tensor([0.1, 0.2, 0.3]))
    assert [bar.get_height() for bar in axes.patches] == [1.0, -2.0, 0.5]
    assert axes.patches[1].get_facecolor() != axes.patches[0].get_facecolor() == axes.patches[2].get_facecolor()
    (lines,) = [lines for lines in axes.collections if len(lines.get_segments()) == 3]
    assert [end[1] - start[1] for start, end in lines.get_segments()] == pytest.approx([0.2, 0.4, 0.6])


def test_a_third_axis_is_several_heat_maps_with_one_scale() -> None:
    values = torch.tensor([1.0, -4.0])[:, None, None] * torch.eye(3)
    drawn = plot_grid(values, [("strength", ["1", "−4"]), ("layer", "012"), ("head", "012")], title="both")
    assert [axes.get_title() for axes in drawn] == ["strength 1", "strength −4"]
    assert [axes.images[0].get_clim() for axes in drawn] == [(-4.0, 4.0)] * 2
    assert [axes.images[0].get_array()[0, 0] for axes in drawn] == [1.0, -4.0]
    assert drawn[0].figure.get_suptitle() == "both"


def test_a_long_third_axis_is_their_mean() -> None:
    values = torch.arange(7.0)[:, None, None] * torch.ones(8, 9)
    axes = plot_grid(values, [("strength", "0123456"), ("layer", "0" * 8), ("head", "0" * 9)], title="mean")
    assert axes.get_title() == "mean, mean over strength"
    assert axes.images[0].get_array().tolist() == [[3.0] * 9] * 8


def test_a_figure_of_ones_own_is_drawn_on() -> None:
    from matplotlib.figure import Figure

    mine = Figure().add_subplot()
    assert plot_grid(torch.ones(2, 2, 3), [("x", "ab"), LAYERS, POSITIONS], mine) is mine
    assert mine.get_title() == "mean over x"


def test_pyplot_knows_nothing_of_it() -> None:
    from matplotlib import pyplot

    plot_grid(torch.ones(2, 3), [LAYERS, POSITIONS])
    assert pyplot.get_fignums() == []


def test_many_labels_are_thinned_out() -> None:
    axes = plot_grid(torch.zeros(2, 1536), [LAYERS, ("neuron", [str(index) for index in range(1536)])])
    assert labels_of(axes.xaxis) == [str(index) for index in range(0, 1536, 24)]


# --- attention --------------------------------------------------------------------------------------------------------

PATHS = Parts([Part.at(f"h.{layer}@softmax()", f"pattern[{layer}]") for layer in range(3)], "pattern")
PATTERN = torch.tensor([[0.0, 1.0], [0.25, 0.75]]).expand(1, 2, 2, 2)


def weights_of(page: Page) -> list[float]:
    numbers = array("H", base64.b64decode(data_of(page)["weights"]))
    return [round(number / 65535, 4) for number in numbers]


class Found:
    pattern = PATHS


def test_the_layers_that_were_captured_are_shown() -> None:
    cache = ActivationCache({"h.2@softmax()": PATTERN, "h.1@softmax()": PATTERN[:, :1].requires_grad_()})
    for parts in (Found, PATHS, PATHS[1:]):
        data = data_of(page := attention_view(cache, parts, ["a", "b"]))
        assert data["layers"] == [{"label": "1", "heads": 1}, {"label": "2", "heads": 2}]
        assert weights_of(page) == [0.0, 1.0, 0.25, 0.75] * 3
    assert (data["queries"], data["keys"], data["cross"]) == ([["a", "b"]], [["a", "b"]], False)


def test_cross_attention_has_two_texts() -> None:
    data = data_of(attention_view({"x": PATTERN[:, :, :1]}, ["x"], ["a"], key_tokens=["k", "l"]))
    assert (data["queries"], data["keys"], data["cross"]) == ([["a"]], [["k", "l"]], True)


def test_half_precision_and_what_is_masked_to_nan() -> None:
    pattern = torch.tensor([[[[0.5, float("nan")], [1.0, 0.0]]]], dtype=torch.bfloat16)
    assert weights_of(attention_view({"x": pattern}, ["x"], ["a", "b"])) == [0.5, 0.0, 1.0, 0.0]


def test_patterns_and_tokens_that_do_not_fit() -> None:
    def refusal(cache: Any, tokens: Any, kind: type[Exception] = TreeMismatch) -> str:
        with pytest.raises(kind) as caught:
            attention_view(cache, ["x", "y"], tokens)
        return str(caught.value)

    assert refusal({"x": PATTERN}, "abc") == "there are 3 tokens, and the patterns have 2 queries."
    assert refusal({"x": PATTERN}, [["a", "b"]] * 2) == "there are tokens for 2 sequences, and patterns for 1."
    assert refusal({"y": PATTERN[0]}, "ab") == (
        "y is no attention pattern [batch, head, query, key], but a tensor of shape (2, 2, 2)."
    )
    assert refusal({"x": (PATTERN,)}, "ab").endswith(", but tuple.")
    assert refusal({"x": PATTERN, "y": PATTERN[..., :1]}, "ab") == (
        "the pattern of layer 1 has shape (1, 2, 2, 1), "
        "that of another one a different one: a page shows layers of one [batch, head, query, key]."
    )
    for cache in ({}, ActivationCache({"h.0": PATTERN})):
        assert refusal(cache, "ab", NotCaptured).startswith("the cache holds no attention pattern of these layers.\n")
    huge = torch.zeros(1).expand(1, 8, 2000, 2000)
    assert "attention_view(acts.index(slice(0, 1)), parts, tokens[:1])" in refusal({"x": huge}, "ab", NiceHooksError)


# --- graphs -----------------------------------------------------------------------------------------------------------


def places(page: Page) -> dict[str, tuple[float, float]]:
    found = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)<', page.body)
    return {name: (float(x), float(y)) for x, y, name in found}


def test_the_first_layer_is_at_the_bottom() -> None:
    where = places(graph_view({"logits": 99, "embed": -1, "a0": 0.5, "b0": 0.5}, []))
    heights = [where[node][1] for node in ("embed", "a0", "logits")]
    assert heights == sorted(heights, reverse=True) and where["a0"][1] == where["b0"][1]
    assert where["embed"][0] == where["logits"][0] == (where["a0"][0] + where["b0"][0]) / 2


def test_nodes_stand_near_those_that_they_talk_to() -> None:
    nodes = {"a": 0, "b": 0, "x": 1, "y": 1}
    where = places(graph_view(nodes, [("a", "y", 1.0), ("b", "x", 1.0)]))
    assert (where["a"][0] < where["b"][0]) == (where["y"][0] < where["x"][0])


def test_an_edge_needs_its_nodes() -> None:
    with pytest.raises(TreeMismatch, match=r"^the edge 'a' → 'c' has no node 'c' among 2\.$"):
        graph_view({"a": 0, "b": 1}, [("a", "c", 1.0)])


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_sites_are_a_tree_in_a_notebook() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2, bias=False)), nn.ReLU())
    assert sites(model, torch.ones(1, 2))._repr_html_() == (
        "<details open><summary><b>(model)</b> Sequential  Tensor[1, 2] float32</summary><ul>"
        "<li><details open><summary><b>0</b> Sequential  Tensor[1, 2] float32</summary><ul>"
        "<li><b>0</b> Linear  Tensor[1, 2] float32  @weight</li></ul></details></li>"
        "<li><b>1</b> ReLU  Tensor[1, 2] float32</li></ul></details>"
    )


def test_what_is_active_is_a_table_in_a_notebook() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert "<caption>nothing is active</caption>" in describe(model)._repr_html_()
    with ablate(model, "0"):
        model(torch.ones(1, 2))
        shown = describe(model)._repr_html_()
    row = "<tr><td><code>0</code></td><td>ablate(model, &#x27;0&#x27;, …)</td><td>with</td><td>yes</td></tr>"
    assert "<caption>1 active</caption>" in shown and row in shown
