"""Selections are remembered as long as the model is as it was, and not a moment longer; nothing is kept alive."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.plain import Named, OtherReLU
from torch import nn

from nicehooks import ModulePath, SiteNotFound, capture, patch_method_to_module, select
from nicehooks.core import traces, walking
from nicehooks.core.selection import select_groups


def texts(model: nn.Module, *where: Any) -> list[str]:
    return [str(site) for site in select(model, *where)]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The patterns that a model was walked through for."""
    seen: list[str] = []
    walk = walking.Walk.__init__

    def counting(self: Any, model: Any, pattern: Any, trace: Any = None) -> None:
        seen.append(pattern._shown)
        walk(self, model, pattern, trace)

    monkeypatch.setattr(walking.Walk, "__init__", counting)
    return seen


REMEMBERED: dict[str, Any] = {
    "a name": "a.0",
    "a wildcard": "**",
    "alternatives": "b.{0,1}",
    "a path": ModulePath.parse("a.*[:, -1]"),
    "a list": ["a.0", ("a.1", "b.*")],
    "all": True,
    "a parameter": "**@weight",
}


@pytest.mark.parametrize("case", REMEMBERED)
def test_what_is_selected_again_is_not_walked_to_again(case: str, walks: list[str]) -> None:
    model, where = Named(), REMEMBERED[case]
    first = select(model, where)
    assert walks
    walks.clear()
    assert select(model, where) == first
    assert walks == []
    assert select_groups(model, where) is select_groups(model, where)
    assert select(Named(), where) != first


def test_a_site_is_remembered_as_itself(walks: list[str]) -> None:
    model, other = Named(), Named()
    (site,) = select(model, "a.0")
    assert select_groups(model, site) is select_groups(model, site)
    assert select(other, site)[0].module is other.a[0]
    assert select(model, site) == [site]
    before, model.a[0] = model.a[0], nn.Linear(2, 2)
    assert select(model, site)[0].module is before
    assert select(model, str(site))[0].module is model.a[0]


NOT_REMEMBERED: dict[str, Any] = {
    "a predicate": lambda name, module: name == "a.0",
    "a regular expression": re.compile("a"),
    "a type": nn.Linear,
    "one among paths": ["a.0", lambda name, module: name == "a.1"],
}


@pytest.mark.parametrize("case", NOT_REMEMBERED)
def test_what_the_users_own_code_chooses_is_not_remembered(case: str) -> None:
    model = Named()
    assert select_groups(model, NOT_REMEMBERED[case]) is not select_groups(model, NOT_REMEMBERED[case])
    calls: list[str] = []
    for _ in range(2):
        select(model, lambda name, module: calls.append(name) is None)
    assert len(calls) == 2 * len(calls[: calls.index("", 1)])


def replace_child(model: Any) -> None:
    model.a[0] = nn.Linear(2, 2)


def replace_child_at_the_same_place_in_memory(model: Any) -> None:
    del model.a[0]
    gc.collect()
    model.a = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def add_child(model: Any) -> None:
    model.a.append(nn.ReLU())


def add_grandchild(model: Any) -> None:
    model.a[1].add_module("new", nn.ReLU())


def remove_child(model: Any) -> None:
    del model.a[1]


def reorder(model: Any) -> None:
    model._modules["a"] = model._modules.pop("a")


def another_type(model: Any) -> None:
    model.a[1].__class__ = OtherReLU


def wrap(model: Any) -> None:
    model.a[1] = nn.DataParallel(model.a[1])


def give_forward(model: Any) -> None:
    model.c.forward = lambda x: x


def fill_parameter(model: Any) -> None:
    model.a[1].register_buffer("weight", torch.ones(2))


def empty_parameter(model: Any) -> None:
    model.a[0].weight = None


def share(model: Any) -> None:
    model.b[1] = model.b[0]


CHANGES: list[Callable[[Any], None]] = [
    replace_child,
    replace_child_at_the_same_place_in_memory,
    add_child,
    add_grandchild,
    remove_child,
    reorder,
    another_type,
    wrap,
    give_forward,
    fill_parameter,
    empty_parameter,
    share,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change: Callable[[Any], None]) -> None:
    """What is selected afterwards is what a model selects that nobody has ever asked."""
    wheres: list[Any] = ["**", "a.*", "**@weight", "c", "a.0", "a.1", "b.{0,1}", "a.**@weight", True]
    model = Named()

    def selected() -> list[Any]:
        found: list[Any] = []
        for where in wheres:
            try:
                found.append([(str(site), id(site.module)) for site in select(model, where)])
            except SiteNotFound as error:
                found.append(str(error))
        return found

    before = selected()
    assert selected() == before
    change(model)
    after = selected()
    traces._memories.clear()
    assert after == selected()
    assert after != before or change in (another_type, wrap)  # a wrapper is not there


def test_each_change_gives_another_stamp_where_it_matters() -> None:
    model = Named()
    plain, wild, part = (select_groups(model, where) for where in ("a.0", "**", "a.*@weight"))
    add_grandchild(model)
    assert select_groups(model, "a.0") is plain  # not on its way
    assert select_groups(model, "**") is not wild
    fill_parameter(model)
    assert select_groups(model, "a.*@weight") is not part
    assert select_groups(model, "a.0") is plain


def test_a_context_that_is_entered_changes_no_selection() -> None:
    model = Named()
    stamp = select_groups(model, "**")
    with capture(model) as acts:
        model(torch.ones(1, 2))
        assert select_groups(model, "**") is stamp
    assert select_groups(model, "**") is stamp
    assert "a.0" in acts


def test_methods_that_become_modules_are_seen() -> None:
    model = Named()
    assert "helper" not in texts(model, "**")
    with patch_method_to_module(Named, "helper"):
        assert "helper" in texts(model, "**")
        assert texts(model, "helper") == ["helper"]
    assert "helper" not in texts(model, "**")


def model_of_a_type_that_knows_it() -> nn.Module:
    known: list[nn.Module] = []

    class Local(Named):
        def known(self) -> Any:
            return known

    known.append(Local())
    return known[0]


def test_nothing_is_kept_alive() -> None:
    """Neither a model, nor a module that was replaced, nor a type, even one whose functions have the model."""
    model: Any = model_of_a_type_that_knows_it()
    for where in ("**", "a.0", "**@weight"):
        select(model, where)
    module, kind, whole = weakref.ref(model.a[0]), weakref.ref(type(model)), weakref.ref(model)
    number = id(model)
    replace_child(model)
    assert module() is None
    del model
    gc.collect()
    assert whole() is None
    assert kind() is None
    assert number not in traces._memories


def test_no_more_is_remembered_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST", 20)
    model = Named()
    for at in range(100):
        assert texts(model, f"a.*[{at}]") == [f"a.0[{at}]", f"a.1[{at}]"]
    assert len(traces._memories[id(model)].selections) < 20


def test_a_model_that_is_not_hashable_is_remembered_too() -> None:
    class Equal(Named):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

    model, other = Equal(), Equal()
    assert select_groups(model, "a.0") is select_groups(model, "a.0")
    assert select(other, "a.0")[0].module is other.a[0]


def test_threads_may_select_at_the_same_time() -> None:
    model, found, errors = Named(), [], []

    def work() -> None:
        try:
            for at in range(200):
                found.append(len(select_groups(model, [f"a.*[{at % 7}]"])[0].sites))
        except Exception as error:  # pragma: no cover
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and set(found) == {2} and len(found) == 800
