"""The path language: text to `ModulePath` and back, what each row of the table in the design means, and every error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from gallery.attention import Softmaxes
from gallery.trees import EachKind
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nicehooks import ModulePath, NiceHooksError, PathError, capture, select
from nicehooks.paths.names import escape
from nicehooks.paths.ports import EVERY_CALL, Port
from nicehooks.ports.attention import FUSED_KERNELS
from nicehooks.values.trees import STAR, Heads

parse = ModulePath.parse


# --- round trips ------------------------------------------------------------------------------------------------------

plain_segments = st.from_regex(r"[a-z_][a-z_0-9]{0,5}|[0-9]{1,3}", fullmatch=True)
braces = st.one_of(
    st.lists(st.from_regex(r"[a-z0-9]{1,3}", fullmatch=True), min_size=1, max_size=3).map(
        lambda o: f"{{{','.join(o)}}}"
    ),
    st.tuples(st.integers(0, 5), st.integers(5, 9)).map(lambda bounds: f"{{{bounds[0]}..{bounds[1]}}}"),
)
any_names = st.text(st.characters(exclude_characters="."), min_size=1, max_size=6)  # torch forbids a dot, nothing else
segments = st.one_of(plain_segments, braces, st.sampled_from(["*", "**", "l*", "*l"]), any_names.map(escape))
names = st.lists(segments, max_size=4).map(".".join)
calls = st.one_of(st.none(), st.integers(0, 20), st.just(EVERY_CALL))
identifiers = st.from_regex(r"[a-z_][a-z_0-9]{0,5}", fullmatch=True).filter(
    lambda n: n not in ("input", "grad", "output")
)
ports = st.one_of(
    st.just(Port()),
    st.sampled_from(["input", "grad", "input.grad"]).map(Port),
    identifiers.map(lambda name: Port("parameter", name)),
    st.builds(Port, st.just("call"), identifiers, calls, st.sampled_from(["", "input"])),
    st.builds(
        Port, st.just("call"), st.sampled_from(list(FUSED_KERNELS)), calls, st.sampled_from(["scores", "pattern"])
    ),
)
integers = st.integers(-100, 100)
slices = st.builds(slice, *[st.none() | integers] * 3).filter(lambda s: s.step != 0)
items = st.one_of(
    integers, slices, st.just(None), st.just(...), st.just(STAR), st.lists(integers, min_size=1, max_size=3)
)
steps = st.one_of(
    items,
    st.text(max_size=6),
    st.lists(items, min_size=1, max_size=4).map(tuple),
    st.integers(1, 64).map(Heads),
)
paths = st.builds(ModulePath, names, calls, ports, st.lists(steps, max_size=4).map(tuple))


@settings(deadline=None)
@given(paths)
@example(ModulePath("h", chain=('it\'s, [a] "key"\\',)))
@example(ModulePath(escape("a{b}*,#@/[]\\")))
@example(ModulePath(escape(" a ")))
@example(ModulePath("h", chain=((0,),)))
def test_a_path_is_what_its_own_text_means(path: ModulePath) -> None:
    """`ModulePath.parse(str(p)) == p` for every path, in every part."""
    again = parse(str(path))
    assert again == path
    assert hash(again) == hash(path)
    assert (again.name, again.call, again.port, again.chain) == (path.name, path.call, path.port, path.chain)


@settings(deadline=None)
@given(
    st.text(st.sampled_from(list("h.3*{},#@/[]:\"' -\\0grad_input()None\u00e9\n")), max_size=20) | st.text(max_size=20)
)
@example("h[{[]}]")
@example("#" + "1" * 5000)
@example("h[" + "(" * 300 + "]")
@example("h[\0]")
@example("h.{0..1000000000000}")
def test_any_text_is_a_path_or_a_path_error_with_a_caret(text: str) -> None:
    """Whatever text comes, it is read the same way twice, or a `PathError` points into it."""
    try:
        path, message = parse(text), None
    except PathError as error:
        path, message = None, str(error)
    if message is None:
        assert parse(str(path)) == path
    else:
        what, _, place = message.rpartition("\n    ")
        assert what.endswith(f"\n    {text}")
        assert place.strip(" ") == "^"
        assert len(place) <= len(text) + 1


@settings(deadline=None)
@given(any_names, any_names)
def test_an_escaped_name_matches_that_name_alone(name: str, other: str) -> None:
    """`escape` takes every special meaning away: the text selects the one module of that name."""
    path = parse(escape(name))
    assert path.matches(name)
    assert path.plain_name == name
    assert path.matches(other) == (other == name)
    assert (path.is_wild, path.call, path.port, path.chain) == (False, None, Port(), ())


@settings(deadline=None)
@given(paths)
def test_a_path_is_a_value(path: ModulePath) -> None:
    """Copying, deep-copying and pickling a path give the same path, its `*` subscripts too."""
    for again in (copy.copy(path), copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert again == path
        assert again.has_stars == path.has_stars
        assert again.chain == path.chain


# --- each row of the table, as text -----------------------------------------------------------------------------------

EVERYTHING = slice(None)

ROWS = {
    "h.3": ModulePath("h.3"),
    "h.*": ModulePath("h.*"),
    "h.**": ModulePath("h.**"),
    "h.{0,3,8}": ModulePath("h.{0,3,8}"),
    "h.{4..9}": ModulePath("h.{4..9}"),
    "**": ModulePath("**"),
    "": ModulePath(""),
    "lstm[0]": ModulePath("lstm", chain=(0,)),
    "lstm[1][0][:, -1]": ModulePath("lstm", chain=(1, 0, (EVERYTHING, -1))),
    "h.3[1:-1:2, ..., None]": ModulePath("h.3", chain=((slice(1, -1, 2), ..., None),)),
    "h.3[:, [0, 2]]": ModulePath("h.3", chain=((EVERYTHING, [0, 2]),)),
    "h.3[0,]": ModulePath("h.3", chain=((0,),)),
    "encoder['last_hidden_state'][:, 0]": ModulePath("encoder", chain=("last_hidden_state", (EVERYTHING, 0))),
    "h.3[:, *]": ModulePath("h.3", chain=((EVERYTHING, STAR),)),
    "h.3[*]": ModulePath("h.3", chain=(STAR,)),
    "h.3.attn.c_proj@input[0]": ModulePath("h.3.attn.c_proj", port=Port("input"), chain=(0,)),
    "h.3@input['hidden_states']": ModulePath("h.3", port=Port("input"), chain=("hidden_states",)),
    "h.3@grad": ModulePath("h.3", port=Port("grad")),
    "h.3@input.grad[0]": ModulePath("h.3", port=Port("input.grad"), chain=(0,)),
    "h.3.mlp.c_fc@weight": ModulePath("h.3.mlp.c_fc", port=Port("parameter", "weight")),
    "h.3.attn@softmax()": ModulePath("h.3.attn", port=Port("call", "softmax")),
    "h.3.attn@_attn()": ModulePath("h.3.attn", port=Port("call", "_attn")),
    "h.3@softmax().input[0]": ModulePath("h.3", port=Port("call", "softmax", None, part="input"), chain=(0,)),
    "h.3@softmax#1()": ModulePath("h.3", port=Port("call", "softmax", 1)),
    "c_proj@input[0]/12[:, :, 7]": ModulePath(
        "c_proj", port=Port("input"), chain=(0, Heads(12), (EVERYTHING, EVERYTHING, 7))
    ),
    "block#1": ModulePath("block", 1),
    "block#*": ModulePath("block", EVERY_CALL),
    "block#1@input[0]": ModulePath("block", 1, Port("input"), (0,)),
}


@pytest.mark.parametrize("text", ROWS)
def test_each_row_of_the_table_is_read_as_its_parts(text: str) -> None:
    path, expected = parse(text), ROWS[text]
    assert (path.name, path.call, path.port, path.chain) == (
        expected.name,
        expected.call,
        expected.port,
        expected.chain,
    )
    assert str(path) == text


def test_the_same_path_may_be_written_in_several_ways() -> None:
    """Blanks in subscripts, the kind of quotes and the name of the default port make no difference."""
    assert str(parse('h[ 0 , : ][ "key" ]')) == "h[0, :]['key']"
    assert parse("h.3@output[0]") == parse("h.3[0]")
    assert parse(parse("h.3")) == parse("h.3")
    assert repr(parse("h.3[0]")) == "ModulePath('h.3[0]')"
    assert parse("h.3") != parse("h.4")
    assert parse("h.3") != "h.3"


# --- each row of the table, on a model --------------------------------------------------------------------------------


torch.manual_seed(0)
MODEL, X = EachKind(), torch.randn(2, 3, 4)
H = [X]
for _layer in MODEL.h:
    H.append(_layer(H[-1]).detach())
LAST = H[-1]

VALUES: dict[str, dict[str, Any]] = {
    "h.1": {"h.1": H[2]},
    "h.*": {"h.0": H[1], "h.1": H[2], "h.2": H[3]},
    "h.{0,2}": {"h.0": H[1], "h.2": H[3]},
    "h.{1..2}": {"h.1": H[2], "h.2": H[3]},
    "{pair,data}[0]": {"pair[0]": LAST, "data[0]": LAST},
    "h.1[0]": {"h.1[0]": H[2][0]},
    "h.1[:, -1]": {"h.1[:, -1]": H[2][:, -1]},
    "h.1[..., 1:3]": {"h.1[..., 1:3]": H[2][..., 1:3]},
    "h.1[:, None, ::2]": {"h.1[:, None, ::2]": H[2][:, None, ::2]},
    "h.1[:, [2, 0]]": {"h.1[:, [2, 0]]": H[2][:, [2, 0]]},
    "h.1[0][1]": {"h.1[0][1]": H[2][0][1]},
    "h.1[:, *]": {"h.1[:, 0]": H[2][:, 0], "h.1[:, 1]": H[2][:, 1], "h.1[:, 2]": H[2][:, 2]},
    "h.1[*, *, 0]": {f"h.1[{i}, {j}, 0]": H[2][i, j, 0] for i in range(2) for j in range(3)},
    "h.1[..., *]": {f"h.1[..., {i}]": H[2][..., i] for i in range(4)},
    "nested[0]": {"nested[0]": LAST},
    "nested[1][0][:, -1]": {"nested[1][0][:, -1]": LAST[:, -1] + 1},
    "nested[-1][-1][0]": {"nested[-1][-1][0]": LAST + 2},
    "nested[1][1][1]": {"nested[1][1][1]": None},
    "nested[1][*]": {"nested[1][0]": LAST + 1, "nested[1][1]": [LAST + 2, None]},
    "pair['right'][:, 0]": {"pair['right'][:, 0]": LAST[:, 0] + 1},
    "pair[1]": {"pair[1]": LAST + 1},
    "data['last_hidden_state'][:, 0]": {"data['last_hidden_state'][:, 0]": LAST[:, 0]},
    "dict['a']": {"dict['a']": LAST + 1},
    "dict[*]": {"dict['b']": LAST, "dict['a']": LAST + 1},
    "h.1@input[0]": {"h.1@input[0]": H[1]},
    "h.1@input['input']": {"h.1@input['input']": H[1]},
    "h.1@input[0]/2[:, :, 1]": {"h.1@input[0]/2[:, :, 1]": H[1][:, :, 2:]},
    "h.1/2[..., 0, :]": {"h.1/2[..., 0, :]": H[2][:, :, :2]},
    "h.1/2[:, :, *]": {"h.1/2[:, :, 0]": H[2][:, :, :2], "h.1/2[:, :, 1]": H[2][:, :, 2:]},
    "h.1@weight": {"h.1@weight": MODEL.h[1].weight.detach()},
    "h.*@bias[0]": {f"h.{i}@bias[0]": MODEL.h[i].bias[0].detach() for i in range(3)},
    "block": {"block": LAST + 2},
    "block#0": {"block#0": LAST + 1},
    "block#1": {"block#1": LAST + 2},
    "block#*": {"block#0": LAST + 1, "block#1": LAST + 2},
    "block#0@input[0]": {"block#0@input[0]": LAST},
    "block#1@input[0]": {"block#1@input[0]": LAST + 1},
    "block#*@input['hidden_states']": {
        "block#0@input['hidden_states']": LAST,
        "block#1@input['hidden_states']": LAST + 1,
    },
    "": {"": LAST + 2},
}


@pytest.mark.parametrize("path", VALUES)
def test_each_row_of_the_table_reads_what_python_would_read(path: str) -> None:
    """The keys of a cache are the single sites that a path stands for; the values are those of the same subscripts."""
    with torch.no_grad(), capture(MODEL, path) as acts:
        MODEL(X)
    assert list(acts) == list(VALUES[path])
    torch.testing.assert_close(dict(acts), VALUES[path], rtol=0, atol=0)


@pytest.mark.parametrize("path", [path for path in VALUES if path != "block#*"])
def test_a_single_site_is_what_its_own_text_selects(path: str) -> None:
    """Every key of a cache can be captured by itself, and is then the only one."""
    for key, value in VALUES[path].items():
        with torch.no_grad(), capture(MODEL, key) as acts:
            MODEL(X)
        assert list(acts) == [key]
        torch.testing.assert_close(acts[key], value, rtol=0, atol=0)


def test_names_select_modules_as_globs_do() -> None:
    """`*` is one segment or a part of one, `**` any number of them, and the empty name is the model itself."""
    model = nn.Sequential()
    model.add_module("h", nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(11)]))
    model.add_module("head", nn.Sequential(nn.ReLU()))

    def selected(path: str) -> list[str]:
        return [str(site) for site in select(model, path)]

    assert selected("") == [""]
    assert selected("*") == ["head"]  # h is a ModuleList, which is never called
    assert selected("h.{0,10,1}") == ["h.0", "h.10", "h.1"]
    assert selected("h.{9..10}.0") == ["h.9.0", "h.10.0"]
    assert selected("h.1*") == ["h.1", "h.10"]
    assert selected("h.*.0") == [f"h.{i}.0" for i in range(11)]
    assert selected("h.**") == [name for i in range(11) for name in (f"h.{i}", f"h.{i}.0", f"h.{i}.1")]
    assert selected("**.0") == ["h.0", *(f"h.{i}.0" for i in range(11)), "head.0"]
    assert selected("h.**.1") == ["h.0.1", "h.1", *(f"h.{i}.1" for i in range(1, 11))]
    assert selected("**") == ["", *selected("h.**"), "head", "head.0"]
    assert selected("{h.0,head}.0") == ["h.0.0", "head.0"]
    assert selected("h{ead,.3}") == ["head", "h.3"]


FIRST = X.softmax(-1).softmax(-1)
SECOND = (FIRST * 2).softmax(-1)
CALLS: dict[str, dict[str, Tensor]] = {
    "@softmax()": {"@softmax()": SECOND},
    "@softmax#0()": {"@softmax#0()": FIRST},
    "@softmax#1()": {"@softmax#1()": SECOND},
    "@softmax#*()": {"@softmax#0()": FIRST, "@softmax#1()": SECOND},
    "@softmax#1().input[0]": {"@softmax#1().input[0]": FIRST * 2},
    "@softmax#0()[:, -1]": {"@softmax#0()[:, -1]": FIRST[:, -1]},
    "@_attn()": {"@_attn()": SECOND},
    "@_attn().input[0]": {"@_attn().input[0]": FIRST},
    "@_attn().input['scores'][0]": {"@_attn().input['scores'][0]": FIRST[0]},
}


@pytest.mark.parametrize("path", CALLS)
def test_each_row_of_the_table_reads_the_calls_in_a_modules_own_forward(path: str) -> None:
    """Not in its children's."""
    model = Softmaxes()
    with capture(model, path) as acts:
        model(X)
    assert list(acts) == list(CALLS[path])
    torch.testing.assert_close(dict(acts), CALLS[path], rtol=0, atol=0)


def gradients(*values: Tensor) -> list[Tensor]:
    """The gradients of the sum of the squares of the last value, with respect to each."""
    return list(torch.autograd.grad((values[-1] ** 2).sum(), values))


X0 = X.clone().requires_grad_()
H1 = MODEL.h[0](X0)
H2 = MODEL.h[1](H1)
G0, G1, G2 = gradients(X0, H1, H2)
GRADIENTS: dict[str, dict[str, Tensor]] = {
    "1@grad": {"1@grad": G2},
    "0@grad": {"0@grad": G1},
    "*@grad[:, -1]": {"1@grad[:, -1]": G2[:, -1], "0@grad[:, -1]": G1[:, -1]},
    "0@input.grad[0]": {"0@input.grad[0]": G0},
    "1@input.grad['input'][0]": {"1@input.grad['input'][0]": G1[0]},
    "0@grad/2[..., 1, :]": {"0@grad/2[..., 1, :]": G1[..., 2:]},
}


@pytest.mark.parametrize("path", GRADIENTS)
def test_each_row_of_the_table_reads_the_gradient_of_what_is_differentiated(path: str) -> None:
    """In the order in which backward comes by."""
    model = nn.Sequential(MODEL.h[0], MODEL.h[1])
    with capture(model, path) as acts:
        (model(X0) ** 2).sum().backward()
    assert list(acts) == list(GRADIENTS[path])
    torch.testing.assert_close(dict(acts), GRADIENTS[path], rtol=0, atol=0)


# --- errors -----------------------------------------------------------------------------------------------------------

ORDER = "one of # @ [ / is expected here, in this order"
INDEX = "an index is an integer, a slice, a quoted key, None, ..., * or a list of integers"
PORT = (
    "a port is expected after @: input, grad, input.grad, a parameter, the gradient of a call name().grad, "
    "or a call name()"
)

ERRORS = [
    # the caret is under the place after the |
    ("h.|{0,3", "this brace has no partner"),
    ("h.0|}", "this brace has no partner"),
    ("h.|{a,{b,c}}", "braces do not nest"),
    ("h.|{9..4}", "this range is empty: its first number is the larger one"),
    ("h.|{0..10000}", "this range has more than 10000 numbers"),
    ("h|..attn", "a module name is missing beside this dot"),
    ("|.h", "a module name is missing beside this dot"),
    ("h|.", "a module name is missing beside this dot"),
    ("| h", "a path has no spaces around it"),
    ("h| ", "a path has no spaces around it"),
    ("h| [0]", "a path has no spaces around it"),
    ("h\\|", "a character is expected after \\"),
    ("h#|", "a call number, or *, is expected after #"),
    ("h#|x", "a call number, or *, is expected after #"),
    ("h#|-1", "a call number, or *, is expected after #"),
    ("h@|", PORT),
    ("h@|[0]", PORT),
    ("h@|softmax(", PORT),
    ("h@|weight.", PORT),
    ("h@input|#1", "a call number belongs to the module (h.3#1@input) or to a call (@softmax#1())"),
    ("h/|0", "the number of heads is at least 1"),
    ("h/|", "the number of heads is expected after /"),
    ("h/|x", "the number of heads is expected after /"),
    ("h|]", ORDER),
    ("h[0]|]", ORDER),
    ("h[0]| ", ORDER),
    ("h[0]|x", ORDER),
    ("h[0]|#1", ORDER),
    ("h[0]|@input", ORDER),
    ("h/12|@input", ORDER),
    ("h@input|@grad", ORDER),
    ("h#1|#2", ORDER),
    ("h|[0", "this bracket is never closed"),
    ("h[0]|[:, [1]", "this bracket is never closed"),
    ("h|['a]", "this bracket is never closed"),
    ("h[|]", "an index is expected between the brackets"),
    ("h[| ]", "an index is expected between the brackets"),
    ("h[|a]", INDEX),
    ("h[|1.5]", INDEX),
    ("h[|True]", INDEX),
    ("h[|(0, 1)]", INDEX),
    ("h[|[0, None]]", INDEX),
    ("h[|{[]}]", INDEX),
    ("h[:,|,]", INDEX),
    ("h[|,]", INDEX),
    ("h[:, |a]", INDEX),
    ("h[|1:2:3:4]", "a slice has at most three parts"),
    ("h[|a:b]", "the bounds of a slice are integers"),
    ("h[:, |a:]", "the bounds of a slice are integers"),
    ("h[|::0]", "the step of a slice is not zero"),
]


@pytest.mark.parametrize(("marked", "what"), ERRORS, ids=[marked for marked, _ in ERRORS])
def test_a_path_error_says_what_and_points_at_the_place(marked: str, what: str) -> None:
    before, _, after = marked.partition("|")
    with pytest.raises(PathError) as caught:
        parse(before + after)
    assert str(caught.value) == f"{what}\n    {before}{after}\n    {' ' * len(before)}^"


def test_a_path_error_as_a_user_sees_it() -> None:
    """Before the model runs, and as a `ValueError` too."""
    with pytest.raises(PathError) as caught, capture(MODEL, "h.1", "h.3[:, -1"):
        raise AssertionError("not reached")
    assert str(caught.value) == (
        "this bracket is never closed\n"
        "    h.3[:, -1\n"
        "       ^"
    )  # fmt: skip
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, NiceHooksError)
