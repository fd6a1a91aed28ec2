"""Pickles of older versions load, and those of today name no file of the house."""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import nicehooks
from nicehooks import KEEP, ActivationCache, ModulePath, capture, hookpoints, hooktrees, patch
from nicehooks.values.regions import STAR

OLD = {path.stem: path for path in sorted((Path(__file__).parents[1] / "pickles").glob("*.pickle"))}
"""Of everything that could be pickled when every file lay beside every other."""

DOORS = {"nicehooks", "nicehooks.public", "nicehooks.hookpoints", "nicehooks.hooktrees", "nicehooks.errors"}


def old(name: str) -> Any:
    return pickle.loads(OLD[name].read_bytes())


@pytest.mark.parametrize("name", OLD)
def test_an_old_pickle_loads(name: str) -> None:
    thing = old(name)
    for each in thing if isinstance(thing, list) else [thing]:
        assert not isinstance(each, ModuleType)
        assert type(each).__module__.split(".")[0] in ("nicehooks", "torch", "builtins", "types", "typing", "abc")


def test_what_old_pickles_hold() -> None:
    cache, every = old("cache"), old("cache_all")
    assert type(cache) is ActivationCache and list(cache) == ["0", "1", ""] and cache["0"].shape == (1, 2)
    assert len(every.calls("0")) == 2
    assert old("constants")[0] is KEEP and old("constants")[1] is STAR
    assert old("path")[3] == ModulePath.parse("h.{0..3}[:, *]") and old("path")[3].chain[0][1] is STAR
    assert str(old("part")) == str(old("parts_resid_post")[0])
    context = old("contexts")[0]
    assert type(context) is capture
    with context as acts:
        context.model(torch.ones(1, 2))
    assert list(acts) == ["0"]


def test_old_pickles_of_public_names_are_those_names() -> None:
    public = [getattr(nicehooks, name) for name in nicehooks.__all__ if name != "KEEP"]
    for ours in old("functions"):
        assert ours in public
    assert set(old("functions_hp")) <= {getattr(hookpoints, name) for name in hookpoints.__all__}
    assert set(old("functions_ht")) <= {getattr(hooktrees, name) for name in hooktrees.__all__}


def test_an_old_module_has_what_its_file_had_and_hides_no_public_function() -> None:
    import nicehooks.activations  # pyright: ignore
    import nicehooks.anatomy  # pyright: ignore # its name is that of a function, too
    import nicehooks.functional  # pyright: ignore
    import nicehooks.seen  # pyright: ignore

    assert nicehooks.activations.ActivationCache is ActivationCache  # pyright: ignore
    assert nicehooks.seen.Calls(["a"]) == ["a"]  # pyright: ignore
    assert callable(nicehooks.anatomy) and callable(nicehooks.functional)
    with pytest.raises(AttributeError, match=r"module 'nicehooks.activations' has no attribute 'nothing'"):
        _ = nicehooks.activations.nothing  # pyright: ignore
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'nicehooks.contexts'"):
        from nicehooks.contexts import nothing  # pyright: ignore # noqa: F401


def todays() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2), hookpoints.HookPoint())
    with capture(model, "*", keep="all") as acts:
        model(torch.ones(1, 2))
    tree = hooktrees.TransformerHooks()
    tree.mlp.post_act.append_fwd(hooktrees.AtLayers(1).append(torch.relu))
    return {
        "cache": acts,
        "paths": [ModulePath.parse("h.*[:, *]"), ModulePath.parse("h.3/12[:, 1]")],
        "keep": KEEP,
        "contexts": [patch(model, "0", 0.0)],
        "functions": [getattr(nicehooks, name) for name in nicehooks.__all__],
        "table": nicehooks.sites(model, torch.ones(1, 2)),
        "model": model,
        "tree": tree,
        "report": hookpoints.check_auto_hook(nn.Linear(2, 2), {"input": torch.ones(1, 2)}),
    }


@pytest.mark.parametrize("name", todays())
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_of_today_names_no_file(name: str, protocol: int) -> None:
    data = pickle.dumps(todays()[name], protocol)
    words = [str(argument) for _, argument, _ in pickletools.genops(data)]
    named = {word.split(" ")[0] for word in words if word.startswith("nicehooks")}
    assert named and named <= DOORS
    assert type(pickle.loads(data)) is type(todays()[name])
