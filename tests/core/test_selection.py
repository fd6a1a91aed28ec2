"""What selects sites, in every form, in which order, under which names; and what is said where nothing is selected."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gallery.calling import Calls, CallsBound, CallsDecorated, CallsForward, CallsSuper
from gallery.gpt import GPT, Attention, Transformer
from gallery.shared import HoldsItself, ThreeNames
from torch import Tensor, nn

from nicehooks import (
    ModulePath,
    PathError,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    capture,
    edit,
    patch,
    select,
)

MODEL = GPT()
IDS = torch.arange(6).reshape(2, 3)
BLOCKS = [f"transformer.h.{i}" for i in range(12)]


def texts(model: nn.Module, *where: Any) -> list[str]:
    return [str(site) for site in select(model, *where)]


# --- the forms of a where ---------------------------------------------------------------------------------------------

ATTENTIONS = [f"{block}.attn" for block in BLOCKS]
FORMS: dict[str, tuple[Any, list[str]]] = {
    "a path": ("transformer.h.3", ["transformer.h.3"]),
    "a parsed path": (ModulePath.parse("transformer.h.3[0]"), ["transformer.h.3[0]"]),
    "a site": (select(MODEL, "transformer.h.3[:, -1]")[0], ["transformer.h.3[:, -1]"]),
    "a list": (["lm_head", "transformer.h.3"], ["lm_head", "transformer.h.3"]),
    "a nested list": (
        ["lm_head", ["transformer.wte", ("transformer.h.3",)]],
        ["lm_head", "transformer.wte", "transformer.h.3"],
    ),
    "a set of one": ({"lm_head"}, ["lm_head"]),
    "a generator": ((f"transformer.h.{i}" for i in (0, 1)), ["transformer.h.0", "transformer.h.1"]),
    "a mapping": ({"lm_head": 1.0, "transformer.wte": 2.0}, ["lm_head", "transformer.wte"]),
    "False": (False, []),
    "False in a list": ([False, "lm_head"], ["lm_head"]),
    "a regular expression": (re.compile(r"h\.1\d$"), ["transformer.h.10", "transformer.h.11"]),
    "a predicate over names": (lambda name, module: name.endswith(".attn"), ATTENTIONS),
    "a predicate over modules": (lambda name, module: getattr(module, "out_features", 0) == 7, ["lm_head"]),
    "a type": (Attention, ATTENTIONS),
    "a list of types": ([nn.Embedding, Transformer], ["transformer.wte", "transformer"]),
    "a base type": (nn.Embedding.__mro__[0], ["transformer.wte"]),
    "a module": (MODEL.transformer.h[3], ["transformer.h.3"]),
    "the model": (MODEL, [""]),
    "a sub-model's part": (MODEL.transformer.h[3].attn.c_proj, ["transformer.h.3.attn.c_proj"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_where_selects_its_sites(form: str) -> None:
    where, expected = FORMS[form]
    assert texts(MODEL, where) == expected


def test_true_and_no_where_at_all_select_every_module_that_can_be_called() -> None:
    every = ["", "transformer", "transformer.wte"]
    for block in BLOCKS:
        every += [block, f"{block}.attn", f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp"]
    every.append("lm_head")
    assert texts(MODEL, True) == every
    assert texts(MODEL) == every
    assert texts(MODEL, "**") == every
    assert texts(MODEL, nn.Module) == every
    assert texts(MODEL, re.compile("")) == every
    assert texts(MODEL, lambda name, module: True) == every


def test_several_wheres_are_one_list() -> None:
    assert texts(MODEL, "lm_head", Attention, False, ["transformer.wte"]) == ["lm_head", *ATTENTIONS, "transformer.wte"]


def test_a_site_is_selected_once_however_often_it_is_named() -> None:
    """But another part of the same module, or another port, is another site."""
    assert texts(MODEL, "lm_head", "*", nn.Linear, "lm_head")[:2] == ["lm_head", "transformer"]
    assert texts(MODEL, "lm_head", "*", "lm_head") == ["lm_head", "transformer"]
    other = ["lm_head", "lm_head[0]", "lm_head@input", "lm_head@weight", "lm_head#0"]
    assert texts(MODEL, other, other) == other


@pytest.mark.parametrize(
    "context", [capture, ablate, lambda m, w: edit(m, w, lambda v: v), lambda m, w: patch(m, {w: 0.0})]
)
def test_every_context_takes_every_form(context: Any) -> None:
    """The contexts select with the same words as `select`."""
    site = select(MODEL, "lm_head")[0]
    forms = ("lm_head", ModulePath.parse("lm_head"), site, ("lm_head",), re.compile("lm_head"), MODEL.lm_head)
    for where in (*forms, lambda name, module: name == "lm_head"):
        called: list[Tensor] = []
        with context(MODEL, where), edit(MODEL, "lm_head", called.append):
            MODEL(IDS)
        assert len(called) == 1


def test_patch_takes_a_value_for_each_form() -> None:
    """In a mapping, the keys may be of different forms; each brings its own value."""
    with patch(MODEL, {nn.Embedding: 1.0, "transformer": 2.0, MODEL.lm_head: 3.0}), capture(MODEL) as acts:
        MODEL(IDS)
    found = [acts[name].unique().tolist() for name in ("transformer.wte", "transformer", "lm_head")]
    assert found == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("what", [42, None, 1.5, [None], ["lm_head", 3]])
def test_what_is_no_where_says_what_is(what: Any) -> None:
    shown = what[-1] if isinstance(what, list) else what
    with pytest.raises(PathError) as caught:
        select(MODEL, what)
    assert str(caught.value) == (
        f"{shown!r} selects no sites: write a path, a Site, True, a regular expression, a predicate "
        "(name, module) -> bool, a module type, a module, or a list of them"
    )


# --- sites ------------------------------------------------------------------------------------------------------------


def test_a_site_knows_its_module_and_its_path() -> None:
    site = select(MODEL, "transformer.h.3.attn@input[0]")[0]
    assert site.name == "transformer.h.3.attn"
    assert site.module is MODEL.transformer.h[3].attn
    assert site.path == ModulePath.parse("transformer.h.3.attn@input[0]")
    assert str(site) == "transformer.h.3.attn@input[0]"
    assert repr(site) == "Site('transformer.h.3.attn@input[0]')"


def test_a_site_equals_itself_and_its_text() -> None:
    """So that a site, a text and a path find the same entry of a cache or of a dict."""
    first, again = (select(MODEL, "lm_head[0]")[0] for _ in range(2))
    assert first == again
    assert first == "lm_head[0]"
    assert first != "lm_head"
    assert first != 3
    assert {first: 1}["lm_head[0]"] == 1
    assert select(GPT(), "lm_head[0]")[0] != first


def test_every_site_is_what_its_own_text_selects() -> None:
    """Names with special characters too: a site's text is a path that selects just it."""
    model = nn.Sequential()
    for name in ("a*b", "#", "x/y", "[0]", "@input", "{a,b}", "\\", "two words", " ", "é", "0"):
        model.add_module(name, nn.ReLU())
    for site in select(model, True, "**@input[0]"):
        assert select(model, str(site)) == [site]
    with capture(model, True) as acts:
        model(torch.ones(1))
    assert list(acts) == [str(site) for site in (*select(model, "*"), *select(model, ""))]


def test_a_site_of_one_model_is_a_path_for_another() -> None:
    """A site of another model selects the module of the same name; there, it is another site."""
    other = GPT()
    site = select(MODEL, "transformer.h.3")[0]
    (found,) = select(other, site)
    assert found.module is other.transformer.h[3]
    assert found != site
    with pytest.raises(SiteNotFound):
        select(nn.Sequential(nn.ReLU()), site)


def test_a_site_does_not_keep_its_model_alive() -> None:
    model = nn.Sequential(nn.ReLU())
    (site,), alive = select(model, "0"), weakref.ref(model)
    del model
    assert alive() is None
    with pytest.raises(SiteNotFound) as caught:
        site.module  # noqa: B018
    assert str(caught.value) == "the module of site '0' no longer exists: select, or enter, again"


# --- one module, several names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "group.c"])
def test_each_name_of_a_shared_module_selects_it(name: str) -> None:
    """A site has the name that was asked for, and a cache finds the value under each of them."""
    model = ThreeNames()
    (site,) = select(model, name)
    assert (str(site), site.module) == (name, model.a)
    assert texts(model, f"{name}.0") == [f"{name}.0"]
    with capture(model, name) as acts:
        model(torch.ones(2))
    assert list(acts) == [name]
    for other in ("a", "b", "group.c"):
        assert acts[other] is acts[name]
        assert acts[f"{other}[0]"].item() == 1.0


@pytest.mark.parametrize("where", ["**", True, "{a,b,group.c}", ["b", "a"], re.compile("a|b|c"), nn.Sequential])
def test_a_shared_module_is_selected_once(where: Any) -> None:
    model = ThreeNames()
    assert [site.module for site in select(model, where)].count(model.a) == 1


def test_a_shared_module_with_a_special_name_is_selected_once() -> None:
    """What a backslash adds to a site's text does not make it another site."""
    model = nn.Sequential(nn.ReLU())
    model.add_module("a*b", model[0])
    assert texts(model, "0", "a\\*b") == ["0"]


def test_a_module_that_contains_itself_is_walked_through_once() -> None:
    model = HoldsItself()
    assert texts(model) == ["", "child", "layer"]
    with capture(model) as acts:
        model(torch.ones(1))
    assert list(acts) == ["child", "layer", ""]


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddp() -> Iterator[nn.Module]:
    """A `DistributedDataParallel` model, alone in its group."""
    import torch.distributed as dist

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel(GPT())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def compiler() -> Any:
    """`torch.compile`, once it is imported, which warns about torch's own code; it only wraps, and compiles nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(nn.ReLU())
    return torch.compile


def wrapped(kind: str, request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, str]:
    """The wrapped model, the model, and the wrapper's prefix."""
    if kind == "compile":
        model = GPT()
        return request.getfixturevalue("compiler")(model), model, "_orig_mod"
    if kind == "DDP":
        model = request.getfixturevalue("ddp")
        return model, model.module, "module"
    if kind == "DataParallel":
        model = GPT()
        return nn.DataParallel(model), model, "module"
    model = GPT()
    return nn.DataParallel(request.getfixturevalue("compiler")(model)), model, "module._orig_mod"


WRAPPERS = pytest.mark.parametrize("kind", ["compile", "DDP", "DataParallel", "both"])


@WRAPPERS
def test_names_match_with_and_without_the_prefix_of_a_wrapper(kind: str, request: pytest.FixtureRequest) -> None:
    wrapper, model, prefix = wrapped(kind, request)
    block = model.transformer.h[3]
    for path in ("transformer.h.3", f"{prefix}.transformer.h.3"):
        (site,) = select(wrapper, path)
        assert (str(site), site.module) == (path, block)
    assert [site.module for site in select(wrapper, f"{prefix}.transformer.h.*")] == list(model.transformer.h)
    assert select(wrapper, prefix)[0].module is model


@WRAPPERS
@pytest.mark.parametrize("where", ["", "*", "**", "*.*", "**.attn", True, nn.Linear, nn.Module, re.compile("^[^.]*$")])
def test_a_wrapper_is_not_there(kind: str, where: Any, request: pytest.FixtureRequest) -> None:
    """A wildcard, a type and a regular expression select in a wrapped model what they select in the model itself."""
    wrapper, model, _ = wrapped(kind, request)
    assert texts(wrapper, where) == texts(model, where)
    assert [site.module for site in select(wrapper, where)] == [site.module for site in select(model, where)]


@WRAPPERS
def test_a_path_written_for_the_wrapper_works_after_unwrapping_and_back(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A site of the wrapped model is a site of the model, and the other way round."""
    wrapper, model, _ = wrapped(kind, request)
    for one, other in ((wrapper, model), (model, wrapper)):
        assert texts(other, select(one, "transformer.h.3[0]")) == ["transformer.h.3[0]"]


def test_a_wrapper_inside_a_model_is_not_there_either(compiler: Any) -> None:
    model = GPT()
    model.transformer.h[1] = compiler(model.transformer.h[1])
    assert texts(model, "transformer.h.*") == BLOCKS
    assert texts(model, "transformer.h.1.*") == ["transformer.h.1.attn", "transformer.h.1.mlp"]
    assert texts(model, "transformer.h.1._orig_mod.attn") == ["transformer.h.1._orig_mod.attn"]
    assert texts(model, True) == texts(MODEL, True)


def test_a_model_of_the_users_own_with_a_child_called_module_is_no_wrapper() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    assert texts(DistributedDataParallel(), True) == ["", "module"]


def test_ddp_is_captured_by_the_models_own_names(ddp: nn.Module) -> None:
    with torch.no_grad(), capture(ddp, "transformer.h.{0,11}", "module.lm_head") as acts:
        output = ddp(IDS)
    assert list(acts) == ["transformer.h.0", "transformer.h.11", "module.lm_head"]
    assert acts["lm_head"] is acts["module.lm_head"]
    assert torch.equal(acts["lm_head"], output)


# --- ports ------------------------------------------------------------------------------------------------------------


def test_a_parameter_path_selects_the_modules_that_have_it() -> None:
    assert texts(MODEL, "lm_head@weight") == ["lm_head@weight"]
    assert texts(MODEL, "transformer.h.3.**@bias") == [
        "transformer.h.3.attn.c_attn@bias",
        "transformer.h.3.attn.c_proj@bias",
        "transformer.h.3.mlp@bias",
    ]
    assert texts(MODEL, "*@weight") == ["lm_head@weight"]
    normed = nn.Sequential(nn.BatchNorm1d(2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert texts(normed, "*@running_mean") == ["0@running_mean"]
    assert texts(normed, "*@weight") == ["0@weight", "1@weight"]


def test_a_list_can_be_asked_for_a_parameter_though_it_is_never_called() -> None:
    model = nn.Sequential(nn.ReLU())
    model.add_module("weights", nn.ParameterList([torch.zeros(2), torch.zeros(2)]))
    assert texts(model, "weights@1") == ["weights@1"]


# --- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("where", ["1", "*", True, nn.Module, "1@input", "1@weight", "1.inside", "1.**"])
def test_torchscript_is_refused_by_name(where: Any) -> None:
    """Wherever it would be selected; the modules around it can be selected."""
    model = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModule) as caught:
        select(model, where)
    assert str(caught.value) == (
        "'1' is a RecursiveScriptModule: TorchScript runs its forward outside of Python, where nothing can be captured "
        "or changed.\n"
        "  Use the original nn.Module instead of the scripted one, or select only modules around it."
    )
    assert texts(model, "", "0") == ["", "0"]
    with pytest.raises(UnsupportedModule, match=r"^'' is a RecursiveScriptModule"):
        select(model[1], "inside")


# --- a __call__ of one's own ------------------------------------------------------------------------------------------


def test_a_call_that_never_gets_to_forward_is_refused_where_it_is_named() -> None:
    """As of a list, a wildcard does not insist on it."""
    model = nn.Sequential(Calls(), nn.ReLU())
    for where in ("0", "0@input[0]", ["1", "0"]):
        with pytest.raises(UnsupportedModule, match=r"^'0' is a Calls, and calling it runs Calls\.__call__"):
            select(model, where)
    assert texts(model, "1") == ["1"]
    with capture(model, "*") as acts:
        assert model(torch.zeros(1)).item() == 5.0
    assert list(acts) == ["1"]


@pytest.mark.parametrize("kind", [CallsSuper, CallsForward, CallsDecorated])
def test_a_call_that_gets_to_forward_is_not(kind: Any) -> None:
    model = nn.Sequential(kind())
    with ablate(model, "0"):
        assert model(torch.ones(1)).item() == 0.0


def test_of_a_call_by_an_attribute_nothing_is_said() -> None:
    assert texts(nn.Sequential(CallsBound()), "0") == ["0"]


# --- what selecting looks at ------------------------------------------------------------------------------------------


class Table(dict):  # type: ignore[type-arg]
    """A table of children that counts how often all of them are asked for."""

    walked = 0

    def items(self) -> Any:
        Table.walked += 1
        return super().items()

    def values(self) -> Any:
        Table.walked += 1
        return super().values()

    def __iter__(self) -> Any:
        Table.walked += 1
        return super().__iter__()


def counted(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        module.__dict__["_modules"] = Table(module._modules)
    Table.walked = 0
    return model


@pytest.mark.parametrize("where", ["", "transformer.h.3.attn", "transformer.h.3[:, -1]", "lm_head@weight", ["lm_head"]])
def test_a_plain_name_is_looked_up_and_not_searched_for(where: Any) -> None:
    """No module is asked for all of its children; not by a context that is entered and left either."""
    model = counted(GPT())
    for _ in range(2):
        assert len(select(model, where)) == 1
    assert Table.walked == 0
    if where != "lm_head@weight":  # may be tied to any other
        with ablate(model, where):
            Table.walked = 0
            with pytest.warns(UserWarning, match="not called"), ablate(model, where):
                pass
            assert Table.walked == 0
            model(IDS)


def test_a_wildcard_goes_only_where_it_may_match() -> None:
    model = counted(GPT())
    assert len(select(model, "transformer.h.*")) == 12
    assert Table.walked == 2  # those of h, once to go on and once to remember them


def test_of_many_places_the_first_are_shown_and_how_many_more_there_are():
    model = nn.Sequential(*[nn.Identity() for _ in range(6)])
    assert repr(capture(model, *"0123")) == "capture(model, '0', '1', '2', '3')"
    assert repr(capture(model, *"012345")) == "capture(model, '0', '1', '2', … 3 more)"
