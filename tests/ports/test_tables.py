"""A forward may do with its parameters what it likes while other values stand there: the model's own are never lost."""

import copy

import pytest
import torch
from gallery.parameters import CountsItsCalls, Reads
from torch import nn

from nicehooks import capture, patch


def popped(module):
    weight = module._parameters.pop("weight")
    assert not hasattr(module, "weight") and "weight" not in module._parameters and len(module._parameters) == 0
    module.weight = weight
    return weight


def halved_for_the_time(module):
    weight = module._parameters.pop("weight")
    module.weight = weight * 2
    used = module.weight / 2
    del module.weight
    module._parameters["weight"] = weight
    return used


def deleted(module):
    weight = module.weight
    del module.weight
    module.weight = nn.Parameter(weight.detach())
    return weight


def cleared(module):
    entries = dict(module._parameters)
    module._parameters.clear()
    assert list(module.parameters()) == []
    module._parameters.update(entries)
    return entries["weight"]


def popped_item(module):
    name, weight = module._parameters.popitem()
    with pytest.raises(KeyError, match="dictionary is empty"):
        module._parameters.popitem()
    assert module._parameters.setdefault(name, weight) is weight
    return weight


def another_dict(module):
    tables = module._parameters
    module._parameters = {"weight": tables["weight"]}
    weight = module.weight
    module._parameters = tables
    return weight


SWAPS = [popped, halved_for_the_time, deleted, cleared, popped_item, another_dict]

COPIES = {
    "copy": lambda table: table.copy(),
    "dict": lambda table: dict(table),
    "stars": lambda table: {**table},
    "or": lambda table: table | {},
    "or behind": lambda table: {} | table,
    "update": lambda table: [made := {}, made.update(table)][0],
    "items": lambda table: dict(table.items()),
    "reversed": lambda table: {name: table[name] for name in reversed(table)},
}
"""How a forward may copy its table."""


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__)
def test_what_a_forward_takes_out_and_puts_back_is_the_other_value_and_then_the_model_s_own(swap):
    model = nn.Sequential(Reads(swap))
    before, own = set(vars(model[0])), model[0].weight
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        for _ in range(2):
            assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 5.0))
    assert model[0]._parameters == {"weight": own} and type(model[0]._parameters) is dict
    assert set(vars(model[0])) == before


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_a_forward_makes_of_its_table_has_the_other_value(how):
    model = nn.Sequential(Reads(lambda module: COPIES[how](module._parameters)["weight"]))
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 5.0))


def test_a_deep_copy_that_a_forward_makes_has_the_model_s_own():
    copies = []
    model = nn.Sequential(Reads(lambda module: [module.weight, copies.append(copy.deepcopy(module))][0]))
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        model(torch.ones(2, 3))
    assert torch.equal(copies[0].weight, torch.ones(3)) and type(copies[0]._parameters) is dict


def test_what_a_forward_takes_out_for_good_while_another_value_stands_there_the_model_keeps():
    """Without the context it would be gone; but what stood there is not the model's to delete."""

    def lose(module):
        weight = module.weight
        del module.weight
        with pytest.raises(AttributeError):
            del module.weight
        return weight

    model = nn.Sequential(Reads(lose))
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        model(torch.ones(2, 3))
    assert torch.equal(model[0].weight, torch.ones(3))


def test_a_table_is_equal_to_a_dict_with_the_same_entries_and_shows_them():
    seen = []

    def look(module):
        table = module._parameters
        table |= {}
        seen.extend([table == {"weight": module.weight}, repr(table) == repr({"weight": module.weight})])
        return table.get("weight", table.get("no such"))

    model = nn.Sequential(Reads(look))
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        model(torch.ones(2, 3))
    assert seen == [True, True]


@pytest.mark.parametrize("path", ["0@scale", "0@calls"])
@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_what_a_forward_assigns_beside_another_value_is_kept(where, path):
    """In compiled code the whole table is another one: what happens to the rest of it goes to the model's own."""
    model = nn.Sequential(CountsItsCalls())
    called = model if where == "eager" else torch.compile(model, backend="eager", fullgraph=True)
    value = torch.full((3,), 2.0) if path == "0@scale" else torch.tensor(7.0)
    for count in range(1, 4):
        with patch(called, {path: value}):
            out = called(torch.ones(2, 3))
        expected = 2.0 + count if path == "0@scale" else 1.0 + 7.0 + 1.0
        assert torch.equal(out, torch.full((2, 3), expected))
    assert model[0].calls == (3 if path == "0@scale" else 0) and torch.equal(model[0].scale, torch.ones(3))


def test_what_a_forward_assigns_stands_there_until_the_context_of_that_value_is_over():
    """Another value that is open for one call of a module alone, inside of the model's, does not take it along."""
    child = CountsItsCalls()
    model = nn.Sequential(child, nn.Identity(), child)
    with patch(model, {"0@calls": torch.tensor(10.0)}), patch(child, {"@scale": torch.zeros(3)}):
        assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 12.0))
    assert child.calls == 0


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_forward_that_assigns_a_replaced_weight_leaves_nothing_in_the_module():
    """In compiled code what stands there is no `nn.Parameter`: it becomes a plain attribute, which hides the weight."""
    model = nn.Sequential(Reads(popped))
    compiled = torch.compile(model, backend="eager")
    before = set(vars(model[0]))
    for _ in range(2):
        with patch(compiled, {"0@weight": torch.full((3,), 5.0)}):
            assert torch.equal(compiled(torch.ones(2, 3)), torch.full((2, 3), 5.0))
    assert set(vars(model[0])) == before and torch.equal(model(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_capture_leaves_a_forward_to_its_tables():
    """Nothing stands in the place of anything: what the forward assigns is the model's."""
    model = nn.Sequential(Reads(deleted))
    own = model[0].weight
    with capture(model, "0@weight") as acts:
        model(torch.ones(2, 3))
    assert acts["0@weight"] is own and model[0].weight is not own


def two():
    """A module that has another parameter beside its weight, and drops it in its forward, if it is there."""
    module = Reads(lambda module: [module._parameters.pop("other", None), module.weight][1])
    module.register_parameter("other", nn.Parameter(torch.ones(3)))
    return module


def test_the_last_entry_goes_first():
    names = []

    def take(module):
        entries = [module._parameters.popitem(), module._parameters.popitem()]
        names.extend(name for name, _ in entries)
        module._parameters.update(reversed(entries))
        return module.weight

    module = Reads(take)
    module.register_parameter("other", nn.Parameter(torch.ones(3)))
    with patch(module, {"@weight": torch.full((3,), 5.0)}):
        assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 5.0))
    assert names == ["other", "weight"]


@pytest.mark.parametrize("where", ["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_what_a_forward_deletes_beside_another_value_is_gone(where):
    model = nn.Sequential(two())
    called = model if where == "eager" else torch.compile(model, backend="eager", fullgraph=True)
    with patch(called, {"0@weight": torch.full((3,), 5.0)}):
        assert torch.equal(called(torch.ones(2, 3)), torch.full((2, 3), 5.0))
    assert list(model.state_dict()) == ["0.weight"]


def test_a_parameter_that_gets_another_name_inside_a_context_keeps_it():
    module = two()
    other = module.other
    with capture(module, "@weight"):
        module(torch.ones(2, 3))
        module._parameters["later"] = other
    assert list(module._parameters) == ["weight", "later"] and module.later is other
    with capture(module, "@weight"):
        module(torch.ones(2, 3))
        module._parameters["latest"] = module._parameters.pop("later")
    assert list(module._parameters) == ["weight", "latest"] and module.latest is other


@pytest.mark.parametrize("paths", [[], ["0@weight"]])
def test_a_context_that_ends_inside_of_the_forward_leaves_the_model_s_own_there(paths):
    """Also where another context needs the table still."""
    handles = []
    model = nn.Sequential(Reads(lambda module: [handles.pop().remove(), module.weight][1]))
    handles.append(patch(model, {"0@weight": torch.full((3,), 5.0)}).attach())
    with capture(model, "0", *paths):
        assert torch.equal(model(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_plain_attribute_of_the_name_of_a_tied_weight_stays():
    model = nn.Sequential(Reads(lambda module: module.weight), Reads(lambda module: module.weight))
    model[1].weight = model[0].weight
    vars(model[1])["weight"] = torch.full((3,), 2.0)
    with patch(model, {"0@weight": torch.full((3,), 5.0)}):
        assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 10.0))
    assert torch.equal(vars(model[1])["weight"], torch.full((3,), 2.0))
