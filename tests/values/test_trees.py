"""Reading and rewriting a part of a nested value, as Python's own subscripts and assignments do, but out of place."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from gallery.returning import Constant, Gives
from gallery.values import Frozen, Output, Pair, Record, tensor_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nicehooks import KEEP, StaleActivation, TreeMismatch, capture, edit
from nicehooks.values.trees import Heads, assign, get, leaves, map_tensors, rewrite, structure_of

# --- tensors and subscripts -------------------------------------------------------------------------------------------


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
bounds = st.none() | st.integers(-4, 4)
slices = st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))


def item_for(size: int, advanced: bool) -> st.SearchStrategy[Any]:
    """What may stand in a subscript at a dimension of `size`."""
    if not size:
        return slices
    numbers = st.integers(-size, size - 1)
    several = st.lists(numbers, min_size=1, max_size=2, unique_by=lambda number: number % size)
    return st.one_of(slices, numbers, several) if advanced else st.one_of(slices, numbers)


@st.composite
def subscripts(draw: Any, shape: tuple[int, ...], advanced: bool = True) -> Any:
    """A subscript that Python takes on a tensor of `shape`: a bare item, or a tuple of them; at most one list."""
    leading = draw(st.integers(0, len(shape)))
    trailing = draw(st.integers(0, len(shape) - leading))
    items: list[Any] = []
    for size in (*shape[:leading], *shape[len(shape) - trailing :]):
        items.append(draw(item_for(size, advanced and not any(isinstance(item, list) for item in items))))
    if trailing or draw(st.booleans()):
        items.insert(leading, ...)
    if draw(st.booleans()):
        items.insert(draw(st.integers(0, len(items))), None)
    if ... in items and draw(st.booleans()):
        items.append(...)  # torch takes another one, which is no dimension
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@st.composite
def indexed(draw: Any, advanced: bool = True) -> tuple[Tensor, Any]:
    shape = draw(shapes)
    return tensor_of(shape), draw(subscripts(shape, advanced))


@settings(deadline=None)
@given(indexed())
def test_get_is_pythons_own_subscript(case: tuple[Tensor, Any]) -> None:
    tensor, index = case
    assert torch.equal(get(tensor, (index,)), tensor[index])


@settings(deadline=None)
@given(indexed())
def test_rewrite_is_pythons_own_assignment_out_of_place(case: tuple[Tensor, Any]) -> None:
    """A copy with `copy[index] = new`; the tensor itself is not written to."""
    tensor, index = case
    new = -1 - tensor[index]
    expected = tensor.clone()
    expected[index] = new
    version = tensor._version
    result = rewrite(tensor, (index,), lambda part: -1 - part)
    assert torch.equal(result, expected)
    assert tensor._version == version
    assert torch.equal(tensor, tensor_of(tuple(tensor.shape)))


@settings(deadline=None)
@given(indexed(advanced=False), st.data())
def test_chains_are_subscripts_of_subscripts(case: tuple[Tensor, Any], data: Any) -> None:
    """`copy[first][second] = new`, on views."""
    tensor, first = case
    second = data.draw(subscripts(tuple(tensor[first].shape), advanced=False))
    expected = tensor.clone()
    expected[first][second] = -1
    assert torch.equal(get(tensor, (first, second)), tensor[first][second])
    assert torch.equal(rewrite(tensor, (first, second), lambda part: torch.full_like(part, -1)), expected)


@settings(deadline=None)
@given(indexed())
def test_rewriting_a_part_with_itself_gives_the_very_same_tensor(case: tuple[Tensor, Any]) -> None:
    tensor, index = case
    assert rewrite(tensor, (index,), lambda part: part) is tensor


def test_a_read_part_is_a_view() -> None:
    """Reading copies nothing."""
    tensor = tensor_of((2, 4))
    for chain in ((0,), ((slice(None), -1),), (Heads(2),), (0, slice(1, 3))):
        assert get(tensor, chain)._base is tensor


def test_a_list_of_indices_leads_on_to_a_part() -> None:
    """Python loses an assignment to a part of `x[[2, 0]]`, which is a copy; a chain does not."""
    tensor = tensor_of((3, 2))
    result = rewrite(tensor, ([2, 0], 0), lambda part: part * 0)
    assert result.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]


def test_heads_are_equal_groups_of_the_last_dimension() -> None:
    """`/n` splits them, and rewriting puts them together again."""
    tensor = tensor_of((2, 6))
    head = (Heads(3), (slice(None), 1))
    assert get(tensor, head).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    result = rewrite(tensor, head, lambda part: part * 0)
    assert result.tolist() == [[0.0, 1.0, 0.0, 0.0, 4.0, 5.0], [6.0, 7.0, 0.0, 0.0, 10.0, 11.0]]
    assert rewrite(tensor, head, lambda part: part) is tensor


# --- under transforms -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(indexed(), st.sampled_from([(0, None), (None, 0), (0, 0)]))
def test_under_vmap_base_and_value_may_be_mapped_or_not(case: tuple[Tensor, Any], in_dims: Any) -> None:
    """Either alone too; the result is that of the loop over the examples."""
    base, index = case
    value = -1 - base[index]
    assume(value.ndim > 0)
    bases, values = torch.stack([base, base + 100]), torch.stack([value, value - 100])

    def assigned(base: Tensor, value: Tensor) -> Tensor:
        return rewrite(base, (index,), lambda part: assign(part, value))

    args = (base if in_dims[0] is None else bases, value if in_dims[1] is None else values)
    loop = [
        assigned(*(arg if dim is None else arg[i] for arg, dim in zip(args, in_dims, strict=True))) for i in range(2)
    ]
    assert torch.equal(torch.vmap(assigned, in_dims)(*args), torch.stack(loop))


@settings(deadline=None)
@given(indexed())
def test_gradients_flow_to_the_part_and_around_it(case: tuple[Tensor, Any]) -> None:
    """As through Python's own assignment to a copy."""
    tensor, index = case
    base = tensor.clone().requires_grad_()
    new = (tensor[index] + 1).clone().requires_grad_()
    weights = tensor_of(tuple(tensor.shape), start=1)
    copied = base.clone()
    copied[index] = new
    results = (rewrite(base, (index,), lambda _: new), copied)
    found, expected = (
        torch.autograd.grad((result * weights).sum(), (base, new), allow_unused=True, materialize_grads=True)
        for result in results
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_tangents_flow_to_the_part_and_around_it() -> None:
    base, new = tensor_of((2, 3)), torch.full((2,), 10.0)
    out, tangent = torch.func.jvp(  # pyright: ignore[reportAssignmentType]
        lambda base, new: rewrite(base, ((slice(None), 1),), lambda _: new), (base, new), (base + 1, new + 1)
    )
    assert out.tolist() == [[0.0, 10.0, 2.0], [3.0, 10.0, 5.0]]
    assert tangent.tolist() == [[1.0, 11.0, 3.0], [4.0, 11.0, 6.0]]


# --- containers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    first: Any


class Plain(dict[str, Any]):
    """A dict of somebody's own."""


KINDS: list[tuple[type, Callable[..., Any], Callable[[Any], dict[Any, Any]]]] = [
    # a type, how it is built from a list, and its children by the subscript of each
    (tuple, lambda c: tuple(c), lambda t: dict(enumerate(t))),
    (list, lambda c: list(c), lambda t: dict(enumerate(t))),
    (dict, lambda c: {f"k{-i}": x for i, x in enumerate(c)}, dict),
    (OrderedDict, lambda c: OrderedDict((f"k{-i}", x) for i, x in enumerate(c)), dict),
    (defaultdict, lambda c: defaultdict(list, {f"k{-i}": x for i, x in enumerate(c)}), dict),
    (Plain, lambda c: Plain({f"k{-i}": x for i, x in enumerate(c)}), dict),
    (Pair, lambda c: Pair(*(c * 2)[:2]), lambda t: t._asdict()),
    (Record, lambda c: Record(*(c * 2)[:2]), vars),
    (Frozen, lambda c: Frozen(*(c * 2)[:2]), vars),
    (Slotted, lambda c: Slotted(c[0]), lambda t: {"first": t.first}),
    (Output, lambda c: Output(torch.zeros(1), tuple(c)), lambda t: dict(t)),
]


def build(children: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(KINDS).map(lambda kind: kind[1](children))


leaf_values = st.one_of(st.none(), shapes.map(tensor_of), st.just("text"), st.integers(0, 3))
trees_of_values = st.recursive(
    leaf_values, lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(build), max_leaves=8
)


def children_of(tree: Any) -> dict[Any, Any] | None:
    """By the subscript of each child; None for a leaf. The tests' own idea of a tree."""
    return next((children(tree) for kind, _, children in KINDS if type(tree) is kind), None)


def parts_of(tree: Any, chain: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every part of a tree, with the subscripts that lead there."""
    yield chain, tree
    for step, child in (children_of(tree) or {}).items():
        yield from parts_of(child, (*chain, step))


def leaves_of(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [(chain, part) for chain, part in parts_of(tree) if children_of(part) is None]


def shape_of(tree: Any) -> Any:
    """The types and subscripts of a tree, in order, without its leaves."""
    children = children_of(tree)
    return "leaf" if children is None else (type(tree), [(step, shape_of(child)) for step, child in children.items()])


@settings(deadline=None)
@given(trees_of_values)
def test_every_part_of_a_tree_can_be_read(tree: Any) -> None:
    """By the subscripts that Python takes, or by the name of a field."""
    for chain, part in parts_of(tree):
        assert get(tree, chain) is part


@settings(deadline=None)
@given(trees_of_values)
def test_every_leaf_of_a_tree_can_be_rewritten(tree: Any) -> None:
    """The types around it are intact, in the same order; every other leaf is the very same object."""
    before = leaves_of(tree)
    for chain, _ in before:
        new = torch.ones(2)
        result = rewrite(tree, chain, lambda _, new=new: new)
        assert shape_of(result) == shape_of(tree)
        for other, leaf in before:
            assert get(result, other) is (new if other == chain else leaf)
    assert all(a[1] is b[1] for a, b in zip(leaves_of(tree), before, strict=True))


@settings(deadline=None)
@given(trees_of_values)
def test_rewriting_a_leaf_with_itself_gives_the_very_same_tree(tree: Any) -> None:
    for chain, _ in parts_of(tree):
        assert rewrite(tree, chain, lambda part: part) is tree


@settings(deadline=None)
@given(trees_of_values)
def test_leaves_are_all_there_and_none_is_one(tree: Any) -> None:
    expected = sorted(id(leaf) for _, leaf in leaves_of(tree))
    assert sorted(map(id, leaves(tree))) == expected


@settings(deadline=None)
@given(trees_of_values)
def test_mapping_tensors_leaves_everything_else_as_it_is(tree: Any) -> None:
    result = map_tensors(lambda tensor: tensor + 1, tree)
    assert shape_of(result) == shape_of(tree)
    for (_, old), (_, new) in zip(leaves_of(tree), leaves_of(result), strict=True):
        assert torch.equal(new, old + 1) if isinstance(old, Tensor) else new is old


@settings(deadline=None)
@given(trees_of_values)
def test_a_module_may_return_any_tree(tree: Any) -> None:
    """Captured, it is the model's own object; edited, its types are intact and the leaf is new."""
    model = nn.Sequential(Constant(tree))
    with capture(model, "0") as acts:
        assert model(None) is tree
    assert acts["0"] is tree
    for chain, leaf in leaves_of(tree):
        if isinstance(leaf, Tensor):
            path = "0" + "".join(f"[{step!r}]" for step in chain)
            with edit(model, path, lambda value: value + 1), capture(model, path) as acts:
                result = model(None)
            assert shape_of(result) == shape_of(tree)
            assert torch.equal(get(result, chain), leaf + 1)
            assert acts[path] is get(result, chain)


def test_elements_of_sequences_are_counted_from_both_ends() -> None:
    a, b, c = (torch.full((), float(i)) for i in range(3))
    for tree in ((a, b, c), [a, b, c], Pair(b, c), torch.return_types.max((b, c)), Record(b, c), Output(b, c)):
        assert get(tree, (-1,)) is c
        assert get(tree, (-2,)) is b
        assert type(rewrite(tree, (-1,), lambda _: a)) is type(tree)
        assert get(rewrite(tree, (-1,), lambda _: a), (-1,)) is a


def test_a_model_output_counts_the_fields_that_are_there() -> None:
    """As it does itself: those that are None do not count."""
    output = Output(logits=torch.zeros(1), loss=torch.ones(1))
    assert get(output, (1,)) is output[1]
    assert get(output, ("loss",)) is output["loss"]


def test_a_dict_has_keys_and_no_positions() -> None:
    """As in Python; numbers are keys where they are keys."""
    assert get({0: "zero", 1: "one"}, (1,)) == "one"
    assert get({1: "one", 0: "zero"}, (0,)) == "zero"
    with pytest.raises(TreeMismatch) as caught:
        get({"b": torch.zeros(1), "a": torch.zeros(1)}, (0,))
    assert str(caught.value) == "[0] is not in {b: Tensor[1] float32, a: Tensor[1] float32}, which has 'b', 'a'"


def test_the_results_of_torch_functions_are_named_tuples() -> None:
    """`torch.max(x, dim)` and others return one with the fields `values` and `indices`."""
    result = torch.max(tensor_of((2, 3)), dim=-1)
    assert get(result, ("values",)) is result.values
    changed = rewrite(result, ("values",), lambda value: value * 0)
    assert type(changed) is torch.return_types.max
    assert changed.values.tolist() == [0.0, 0.0]
    assert changed.indices is result.indices
    assert structure_of(result) == "max(values: Tensor[2] float32, indices: Tensor[2] int64)"


def test_a_packed_sequence_is_a_named_tuple() -> None:
    packed = nn.utils.rnn.pack_sequence([tensor_of((3, 2)), tensor_of((1, 2))])
    changed = rewrite(packed, ("data",), lambda data: data * 0)
    assert type(changed) is nn.utils.rnn.PackedSequence
    assert changed.batch_sizes is packed.batch_sizes
    assert not changed.data.any()


class Doubled(Pair):
    """A named tuple with a constructor of its own."""

    def __new__(cls, both: Any) -> Doubled:
        return super().__new__(cls, both, both)


def test_a_named_tuple_is_rebuilt_without_its_constructor() -> None:
    doubled = Doubled(torch.zeros(1))
    for changed in (rewrite(doubled, ("left",), lambda value: value + 1), assign(doubled, (1.0, KEEP))):
        assert type(changed) is Doubled
        assert (changed.left.item(), changed.right) == (1.0, doubled.right)


@dataclasses.dataclass
class Rich:
    """What dataclasses can have beside plain fields."""

    kind: ClassVar[str] = "rich"
    value: Tensor
    scale: dataclasses.InitVar[float] = 1.0
    norm: Any = dataclasses.field(init=False)
    hidden: str = dataclasses.field(default="hidden", repr=False, compare=False, kw_only=True)

    def __post_init__(self, scale: float) -> None:
        self.norm = scale
        self.beside = "no field"


class Carrying(Plain):
    """A dict with an attribute."""

    beside = "of the class"


REBUILDS: dict[str, Callable[[Any, Any], Any]] = {
    "rewrite": lambda tree, step: rewrite(tree, (step,), lambda value: value + 1),
    "map_tensors": lambda tree, step: map_tensors(lambda value: value + 1, tree),
    "assign": lambda tree, step: assign(tree, 1.0),
}


@pytest.mark.parametrize("how", REBUILDS)
def test_a_rebuilt_dataclass_has_all_that_it_had(how: str) -> None:
    """Fields that `__init__` does not take, and attributes that are no fields, stay; `__post_init__` does not run.

    What only the class has, or `__init__` takes, stays there.
    """
    record = Rich(torch.zeros(1), 3.0, hidden="mine")
    result = REBUILDS[how](record, "value")
    assert vars(result) == {"value": torch.ones(1), "norm": 3.0, "hidden": "mine", "beside": "no field"}
    assert vars(record)["value"].item() == 0.0


@pytest.mark.parametrize("how", REBUILDS)
def test_a_rebuilt_dict_has_all_that_it_had(how: str) -> None:
    """Attributes beside its items, a default factory, and the order of its keys."""
    carrying = Carrying({"b": torch.zeros(1), "a": None})
    carrying.beside = "mine"
    result = REBUILDS[how](carrying, "b")
    assert (type(result), result.beside, list(result)) == (Carrying, "mine", ["b", "a"])
    default = REBUILDS[how](defaultdict(list, b=torch.zeros(1), a=None), "b")
    assert (default.default_factory, list(default)) == (list, ["b", "a"])
    assert list(REBUILDS[how]({"b": torch.zeros(1), "a": None}, "b")) == ["b", "a"]


class Listed(list):
    """A list with an attribute, and a constructor of its own."""

    def __init__(self, first: Any, *, note: str) -> None:
        super().__init__([first, None])
        self.note = note


class Tupled(tuple):
    """The same as a tuple."""

    def __new__(cls, first: Any, *, note: str) -> Tupled:
        return super().__new__(cls, (first, None))

    def __init__(self, first: Any, *, note: str) -> None:
        self.note = note


@pytest.mark.parametrize("how", REBUILDS)
@pytest.mark.parametrize("kind", [Listed, Tupled])
def test_a_list_or_tuple_of_another_type_is_taken_apart_and_rebuilt_with_all_that_it_had(kind: Any, how: str) -> None:
    given = kind(torch.zeros(1), note="mine")
    result = REBUILDS[how](given, 0)
    assert (type(result), vars(result), result[0].item(), result[1]) == (kind, {"note": "mine"}, 1.0, None)
    assert given[0].item() == 0.0


class Reversed(list):
    """A list that gives its items in another order: nobody knows what is in it."""

    def __iter__(self) -> Any:
        return reversed(range(len(self)))


def test_a_list_that_gives_its_items_in_its_own_way_is_a_leaf() -> None:
    (leaf,) = leaves(tree := Reversed([1, 2]))
    assert leaf is tree


@pytest.mark.parametrize("kind", [Listed, Tupled])
def test_what_is_in_a_list_or_tuple_of_another_type_is_watched_and_cloned(kind: Any) -> None:
    model = nn.Sequential(Gives(lambda x: kind(x * 2, note="")), Gives(lambda found: found[0].zero_()))
    with capture(model, "0") as acts, capture(model, "0", clone=True) as copies:
        model(torch.ones(1))
    assert copies["0"][0].item() == copies["0[0]"].item() == 2.0
    with pytest.raises(StaleActivation, match="'0' was overwritten"):
        acts["0"]


class TorchBox:
    """Registered with torch's pytrees; the context is a list that names nothing."""

    def __init__(self, *contents: Any) -> None:
        self.contents = contents


class OptreeBox(TorchBox):
    """Registered with optree for everybody."""


torch_pytree.register_pytree_node(
    TorchBox, lambda b: (list(b.contents), [1] * len(b.contents)), lambda c, _: TorchBox(*c)
)
optree.register_pytree_node(
    OptreeBox, lambda b: (b.contents, None), lambda _, c: OptreeBox(*c), namespace=optree.registry.__GLOBAL_NAMESPACE
)


@pytest.mark.parametrize("kind", [TorchBox, OptreeBox, lambda *contents: deque(contents, maxlen=5)])
def test_what_others_have_registered_is_taken_apart_as_they_say(kind: Any) -> None:
    """Its children have positions."""
    box = kind(torch.zeros(1), None, torch.ones(1))
    changed = rewrite(box, (-1,), lambda value: value + 1)
    assert type(changed) is type(box)
    assert (get(changed, (2,)).item(), get(changed, (1,))) == (2.0, None)
    assert get(changed, (0,)) is get(box, (0,))
    assert [leaf if leaf is None else leaf.item() for leaf in leaves(map_tensors(torch.neg, box))] == [0.0, None, -1.0]
    assert getattr(changed, "maxlen", 5) == 5


def test_other_peoples_pytrees_stay_as_they_are() -> None:
    """Making types known to this library changes nothing for optree's and torch's own users."""
    record = Record(torch.zeros(1), None)
    map_tensors(torch.clone, record)
    assert optree.tree_leaves(record) == [record]
    assert torch_pytree.tree_leaves(record) == [record]


# --- assignment -------------------------------------------------------------------------------------------------------

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])


@settings(deadline=None)
@given(shapes, shapes, dtypes, dtypes)
def test_assigning_a_tensor_is_pythons_own_assignment(old: Any, new: Any, to: torch.dtype, of: torch.dtype) -> None:
    """`copy[...] = new` broadcasts and casts; what Python refuses is a `TreeMismatch`."""
    place, value = tensor_of(old, to), tensor_of(new, of, start=1)
    expected = place.clone()
    try:
        expected[...] = value
    except RuntimeError:
        with pytest.raises(TreeMismatch):
            assign(place, value)
    else:
        result = assign(place, value)
        assert (result.dtype, result.shape) == (to, place.shape)
        assert torch.equal(result, expected)
    assert torch.equal(place, tensor_of(old, to))


@settings(deadline=None)
@given(shapes, dtypes, st.sampled_from([0, 1, 0.5, True, 2.0]))
def test_assigning_a_number_is_pythons_own_assignment(shape: Any, dtype: torch.dtype, number: Any) -> None:
    expected = tensor_of(shape, dtype)
    expected[...] = number
    result = assign(tensor_of(shape, dtype), number)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@settings(deadline=None)
@given(trees_of_values)
def test_assigning_a_tree_to_itself_or_keep_changes_nothing(tree: Any) -> None:
    assert assign(tree, tree) is tree
    assert assign(tree, KEEP) is tree
    assert assign(tree, copy.copy(tree)) is tree or children_of(tree) is None


@settings(deadline=None)
@given(trees_of_values)
def test_assigning_a_tree_replaces_leaf_by_leaf(tree: Any) -> None:
    new = map_tensors(lambda tensor: tensor + 1, tree)
    result = assign(tree, new)
    assert shape_of(result) == shape_of(tree)
    for (_, wanted), (_, got) in zip(leaves_of(new), leaves_of(result), strict=True):
        assert torch.equal(got, wanted) if isinstance(wanted, Tensor) else got is wanted


@settings(deadline=None)
@given(trees_of_values)
def test_a_number_fills_every_tensor_and_nothing_else(tree: Any) -> None:
    """Also where there is no tensor at all: a module that returns None still does."""
    assume(children_of(tree) is not None or tree is None or isinstance(tree, Tensor))
    result = assign(tree, 7)
    assert shape_of(result) == shape_of(tree)
    for (_, old), (_, new) in zip(leaves_of(tree), leaves_of(result), strict=True):
        assert torch.equal(new, torch.full_like(old, 7)) if isinstance(old, Tensor) else new is old


def test_keep_leaves_a_part_alone() -> None:
    a, b, c = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    old = (a, [b, {"c": c}])
    first, (second, third) = assign(old, (KEEP, [1.0, KEEP]))
    assert first is a
    assert second.tolist() == [1.0, 1.0]
    assert third is old[1][1]


def test_a_mapping_may_name_only_some_keys() -> None:
    old = Output(logits=torch.zeros(2), states=(torch.zeros(1),))
    result = assign(old, {"logits": 1.0})
    assert type(result) is Output
    assert result.logits.tolist() == [1.0, 1.0]
    assert result.states is old.states
    assert assign({"b": torch.zeros(1), "a": torch.zeros(1)}, {"a": 3.0})["a"].item() == 3.0


def test_tuples_and_lists_stand_for_each_other_in_values() -> None:
    """The type of the place is what counts."""
    old = (torch.zeros(1), [torch.zeros(1), None])
    result = assign(old, [torch.ones(1), (2.0, None)])
    assert shape_of(result) == shape_of(old)
    assert (result[0].item(), result[1][0].item()) == (1.0, 2.0)
    named = assign(Pair(torch.zeros(1), None), (torch.ones(1), None))
    assert type(named) is Pair


def test_keep_is_one_object() -> None:
    """Also in a copied or pickled tree of values."""
    assert copy.deepcopy([KEEP])[0] is KEEP
    assert copy.copy(KEEP) is KEEP
    assert pickle.loads(pickle.dumps(KEEP)) is KEEP
    assert repr(KEEP) == "KEEP"
