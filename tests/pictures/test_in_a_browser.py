"""Pages in a real browser: by pointer and keyboard, in light and dark, at a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from browser import Browser

from nicehooks import attention_view
from nicehooks.pictures.graphs import graph_view
from nicehooks.pictures.grids import grid_view
from nicehooks.pictures.pages import Page

NASTY = "</script><b>x</b>"


def grid() -> Page:
    axes = [("layer", "012"), ("position", ["the", NASTY, "the", "$y$"])]
    values = torch.tensor([[0.0, 2.0, 1.0, 0.0], [-3.0, 1.0, 0.0, 0.5], [0.25, 3.0, float("nan"), 0.0]])
    sites = [f"h.{layer}[:, {position}]" for layer in range(3) for position in range(4)]
    return grid_view(values, axes, "a grid", values.abs() / 10, sites, ["A note."])


def bars() -> Page:
    return grid_view(torch.tensor([1.0, -2.0, 0.5]), [("head", "012")], "bars")


def strengths() -> Page:
    values = torch.tensor([1.0, 2.0, 6.0])[:, None, None] * torch.eye(4)
    return grid_view(values, [("strength", ["1", "2", "6"]), ("layer", "0123"), ("head", "0123")], "strengths")


def attention() -> Page:
    pattern = torch.eye(3).expand(2, 2, 3, 3).clone()
    pattern[0, 1, 2] = torch.tensor([0.25, 0.75, 0.0])
    pattern[1, 0, 2] = torch.tensor([1.0, 0.0, 0.0])
    return attention_view({"0": pattern[:, :1], "1": pattern}, ["0", "1"], [["When", NASTY, "\n"], ["If", " so", " x"]])


def graph() -> Page:
    nodes = {"embed": 0, "a0.h0": 1, NASTY: 1, "m0": 2, "logits": 3}
    edges = [("embed", "a0.h0", 0.5, "q"), ("embed", "a0.h0", -0.25, "k"), ("a0.h0", "logits", 2.0), (NASTY, "m0", 1.0)]
    return graph_view(nodes, edges)


PAGES = {"grid": grid, "bars": bars, "strengths": strengths, "attention": attention, "graph": graph}


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_a_page_stands_alone_and_fits_in_both_schemes(make, browser: Browser, tmp_path: Path):
    browser.check_in_both_schemes(make().to_html(tmp_path / "page.html"))


def test_a_cell_says_its_value_under_the_pointer(browser: Browser, tmp_path: Path):
    browser.open(grid().to_html(tmp_path / "page.html"))
    assert browser.texts("h1, main > p:first-of-type") == ["a grid", "A note."]
    browser.hover(browser.find("td", 4))
    assert browser.texts("#tip") == ["layer 1, position the: −3 ± 0.3\nh.1[:, 0]"]
    browser.hover(browser.find("td", 1))
    assert browser.texts("#tip") == [f"layer 0, position {NASTY}: +2 ± 0.2\nh.0[:, 1]"]
    browser.hover(browser.find("td", 10))
    assert browser.texts("#tip") == ["layer 2, position the: none\nh.2[:, 2]"]
    browser.hover(browser.find("h1"))
    assert browser.texts("#tip") == [""]


def rows(browser: Browser) -> list[str]:
    return browser.texts("tbody th")


def columns(browser: Browser) -> list[str]:
    return browser.texts("thead th")[1:]


def test_a_click_on_a_label_sorts(browser: Browser, tmp_path: Path):
    browser.open(grid().to_html(tmp_path / "page.html"))
    heading = browser.find("thead button", 2)
    orders = []
    for _ in range(3):
        heading.click()
        orders.append(rows(browser))
    assert orders == [["2", "0", "1"], ["1", "0", "2"], ["0", "1", "2"]]
    browser.find("tbody button", 1).click()
    assert columns(browser) == [NASTY, "$y$", "the", "the"]
    assert browser.texts("tbody tr:nth-child(2) td") == ["1.00", "0.50", "0", "−3.00"]
    assert browser.ask("document.querySelectorAll('[aria-sort=descending]').length") == 1
    browser.hover(browser.find("tbody tr:nth-child(2) td"))
    assert browser.texts("#tip")[0].startswith(f"layer 1, position {NASTY}: +1 ")
    browser.find(".corner button").click()
    assert (rows(browser), columns(browser)) == (["0", "1", "2"], ["the", NASTY, "the", "$y$"])


def test_the_keyboard_moves_and_sorts(browser: Browser, tmp_path: Path):
    browser.open(grid().to_html(tmp_path / "page.html"))
    browser.press("TAB", "ARROW_RIGHT", "ARROW_RIGHT", "ENTER")
    assert rows(browser) == ["2", "0", "1"]
    browser.press("ARROW_DOWN")
    assert browser.texts("#tip") == [f"layer 2, position {NASTY}: +3 ± 0.3\nh.2[:, 1]"]
    browser.press("END", "ARROW_UP", "HOME", "ARROW_UP", "ENTER")  # to the corner, which puts back the order
    assert rows(browser) == ["0", "1", "2"]
    browser.press("ARROW_DOWN", "ARROW_DOWN", "ARROW_RIGHT", "ESCAPE")
    assert browser.texts("#tip") == [""]
    assert browser.ask("document.querySelectorAll('table [tabindex=\"0\"]').length") == 1


def test_bars_are_as_long_as_their_values(browser: Browser, tmp_path: Path):
    browser.open(bars().to_html(tmp_path / "page.html"))
    widths = browser.ask("[...document.querySelectorAll('.bar')].map((bar) => bar.getBoundingClientRect().width)")
    assert [width / widths[1] for width in widths] == pytest.approx([0.5, 1.0, 0.25], abs=0.01)
    assert browser.texts("td") == ["+1", "−2", "+0.5"]
    browser.find("thead button", 1).click()
    assert rows(browser) == ["0", "2", "1"]


def test_of_a_third_axis_one_is_shown_or_the_mean(browser: Browser, tmp_path: Path):
    browser.open(strengths().to_html(tmp_path / "page.html"))
    assert browser.texts("tbody tr:first-child td") == ["3.00", "0", "0", "0"]
    browser.hover(browser.find("td"))
    assert browser.texts("#tip") == ["layer 0, head 0, strength (mean): +3"]
    browser.find("option", 3).click()
    assert browser.texts("tbody tr:first-child td") == ["6.00", "0", "0", "0"]


def shares(browser: Browser) -> list[float]:
    return browser.ask("[...document.querySelectorAll('.text span')].map((e) => +e.style.getPropertyValue('--weight'))")


def test_a_token_lights_up_where_it_attends(browser: Browser, tmp_path: Path):
    browser.open(attention().to_html(tmp_path / "page.html"))
    assert browser.texts(".text span") == ["When", NASTY, "↵"]
    assert browser.texts("h2") == ["layer 0, head 0"]
    assert shares(browser) == [0.0, 0.0, 1.0]  # the last one is looked at first
    browser.find(".heads button", 2).click()
    assert (browser.texts("h2"), shares(browser)) == (["layer 1, head 1"], [0.25, 0.75, 0.0])
    assert browser.texts(".said") == [f'"\\n" (2) attends to "{NASTY}" (1) 0.750, "When" (0) 0.250']
    browser.hover(browser.find(".text span", 1))
    assert shares(browser) == [0.0, 1.0, 0.0]
    browser.find("option[value=to]").click()
    assert shares(browser) == [0.0, 1.0, 0.75]
    browser.find("select option", 1).click()  # the other example
    browser.find(".heads button", 1).click()
    assert browser.texts(".text span") == ["If", " so", " x"]
    browser.hover(browser.find(".text span", 0))
    assert browser.texts(".said") == ['"If" (0) is attended to by "If" (0) 1.000, " x" (2) 1.000']


def test_heads_and_tokens_are_reached_by_keys(browser: Browser, tmp_path: Path):
    browser.open(attention().to_html(tmp_path / "page.html"))
    browser.press("TAB", "TAB", "TAB", "END", "ARROW_LEFT")
    assert browser.texts(".from") == [NASTY]
    browser.press("TAB", "ARROW_DOWN", "ARROW_RIGHT", "ENTER")
    assert browser.texts("h2") == ["layer 1, head 1"]


def test_the_small_pictures_show_the_patterns(browser: Browser, tmp_path: Path):
    browser.open(attention().to_html(tmp_path / "page.html"))
    drawn = browser.ask(
        "[...document.querySelectorAll('.heads canvas')].map((canvas) => [...canvas.getContext('2d')"
        ".getImageData(0, 0, 3, 3).data].filter((_, index) => index % 4 === 3))"
    )
    assert drawn == [[255, 0, 0, 0, 255, 0, 0, 0, 255]] * 2 + [[255, 0, 0, 0, 255, 0, 64, 191, 0]]


def test_a_node_lights_up_its_edges(browser: Browser, tmp_path: Path):
    browser.open(graph().to_html(tmp_path / "page.html"))
    widths = browser.ask("[...document.querySelectorAll('.edge')].map((e) => e.getAttribute('stroke-width'))")
    assert widths == ["1.12", "2.25", "4.50", "9.00"]
    browser.hover(browser.find("[data-node=embed]"))
    assert browser.texts("#tip") == ["embed → a0.h0 (q): +0.5\nembed → a0.h0 (k): -0.25"]
    assert browser.texts(".node.on") == ["a0.h0", "embed"]
    browser.hover(browser.find("h1"))
    assert browser.texts(".lit") == []
    assert browser.texts("td:last-child") == ["+2", "+1", "+0.5", "−0.25"]
    browser.find("thead button", 0).click()
    assert browser.texts("td:first-child") == [NASTY, "a0.h0", "embed", "embed"]
    browser.find(".node").click()  # the focus goes there, and from there by arrows
    browser.press("ARROW_RIGHT")
    assert browser.texts("#tip") == [f"{NASTY} → m0: +1"]


def test_a_notebook_shows_a_page_in_a_frame_of_its_height(browser: Browser, tmp_path: Path):
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><body data-jp-theme-light=false>{grid()._repr_html_()}")
    browser.open(notebook)
    inside = "document.querySelector('iframe').contentDocument"
    assert browser.ask(f"{inside}.querySelectorAll('td').length") == 12
    frame, body = browser.ask(
        f"[document.querySelector('iframe').clientHeight, {inside}.documentElement.scrollHeight]",
    )
    assert frame == body
    assert browser.ask(f"getComputedStyle({inside}.body).backgroundColor") == "rgb(23, 24, 28)"  # as dark as JupyterLab
