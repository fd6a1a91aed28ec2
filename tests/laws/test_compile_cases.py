"""Law 9, case by case: every kind of place and intervention, around compiled code and inside of it."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack

import pytest
import torch
import torch._dynamo
from gallery.attention import Fused, ScoresAttention
from gallery.calling import BreaksInTheMiddle
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from worlds import graphs, inputs, make, state

from nicehooks import KEEP, ablate, capture, captured, edit, fused_attention_as_steps, patch, splice, steer, suspend
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees

V = torch.linspace(-1, 1, 6)
AUTOENCODER = nn.Linear(6, 6)


def build(name):
    torch.manual_seed(0)
    return {"Attention": ScoresAttention, "Fused": Fused}[name]() if name in ("Attention", "Fused") else make(name)


FUSED = "@scaled_dot_product_attention()"

CASES = {
    "parts": ("Mlp", lambda m: capture(m, "blocks.*", "head@input[0]", "embed[:, 0]", "embed/2[..., 1, :]")),
    "every module": ("Mlp", lambda m: capture(m)),
    "a type, a module, a regular expression, a predicate": (
        "Mlp",
        lambda m: capture(m, nn.Tanh, m.embed, re.compile(r"blocks\.0\.0"), lambda name, module: name == "head"),
    ),
    "each index": ("Mlp", lambda m: capture(m, "embed[:, *]")),
    "all calls": ("Thrice", lambda m: capture(m, "block", keep="all")),
    "the first call": ("Thrice", lambda m: capture(m, "block", keep="first")),
    "calls": ("Thrice", lambda m: capture(m, "block#*")),
    "a call": ("Thrice", lambda m: capture(m, "block#1[:, 0]")),
    "a map": ("Mlp", lambda m: capture(m, "blocks.*", map=lambda value, site: value.mean())),
    "options": ("Mlp", lambda m: capture(m, "blocks.*", detach=True, clone=True, to=torch.float64)),
    "stop": ("Mlp", lambda m: capture(m, "blocks.1", stop=True)),
    "trees": ("Nested", lambda m: capture(m, "nest", "nest[1]['a'][0]", "nest[2]['box']['content'][0]")),
    "arguments": ("Normed", lambda m: capture(m, "gate@input['by']", "gate@input['scale']", "gate@input[1]")),
    "a parameter": ("Mlp", lambda m: capture(m, "head@weight")),
    "a parameter replaced": ("Mlp", lambda m: patch(m, "head@weight[0]", V)),
    "a parameter steered": ("Mlp", lambda m: steer(m, "blocks.0.0@weight", V)),
    "edit": ("Mlp", lambda m: edit(m, "blocks.*", lambda v, site: v * 2 if str(site) == "blocks.1" else v)),
    "an edit that looks": ("Mlp", lambda m: edit(m, "blocks.*", lambda value: None)),
    "an edit in a tree": ("Nested", lambda m: edit(m, "nest[1]['a'][0]", lambda value: value * 2)),
    "an edit of an argument": ("Mlp", lambda m: edit(m, "head@input[0][:, 0]", lambda value: value * 2)),
    "an edit of a default": ("Normed", lambda m: edit(m, "gate@input['scale']", lambda value: value * 2)),
    "patches": ("Mlp", lambda m: patch(m, {"blocks.0[:, 0]": V[:5], "blocks.1": 0.5, "blocks.2[:, 1:3]": V[1:3]})),
    "a patch with holes": ("Nested", lambda m: patch(m, "nest", (KEEP, KEEP, {"box": KEEP}))),
    "steer": ("Mlp", lambda m: steer(m, "blocks.{0..1}", V, scale=2.0)),
    "ablate": ("Mlp", lambda m: ablate(m, "embed", "blocks.2")),
    "ablate a call": ("Thrice", lambda m: ablate(m, "block", calls=1)),
    "ablate a step": ("Thrice", lambda m: ablate(m, "block", steps=0)),
    "splice": ("Mlp", lambda m: splice(m, "blocks.1", AUTOENCODER, error=True)),
    "a function": ("Attention", lambda m: capture(m, "@softmax()", "@softmax().input[0]", "@matmul#1()")),
    "a function edited": ("Attention", lambda m: edit(m, "@softmax()", lambda value: value * 2)),
    "a method": ("Attention", lambda m: capture(m, "@scores()", "@scores().input['query']")),
    "a method edited": ("Attention", lambda m: edit(m, "@scores()", lambda value: value * 2)),
    "an argument of a C function": ("Fused", lambda m: ablate(m, FUSED + ".input['query']")),
    "steps of fused attention": ("Fused", lambda m: edit(m, FUSED + ".scores", lambda value: value * 2)),
    "a pattern": ("Fused", lambda m: capture(m, FUSED + ".pattern")),
}


pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]  # the law in short is in test_compile.py


def compiled(f):
    return torch.compile(f, fullgraph=True, backend="eager")


def agree(found, expected):
    assert trees.structure_of(found) == trees.structure_of(expected)
    pairs = zip(trees.leaves(found), trees.leaves(expected), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def entered(make_context, f):
    """`f` inside the context; what the context saw comes with the result."""

    def run(x):
        with make_context() as seen:
            out = f(x)
        return (out, seen) if isinstance(seen, dict) else out

    return run


def check(run, expected, model):
    """That `run` does what `expected` does, three times, with one graph and nothing left behind."""
    before, made = state(model), []
    for shift in range(3):
        x = inputs() + shift
        agree(run(x), expected(x))
        made.append(graphs())
        assert state(model) == before
    assert made == [made[0]] * 3


# Around compiled code, these are in test_compile.py: each entered again and again.
ALSO_IN_SHORT = {"parts", "every module", "a parameter steered", "ablate", "splice"}


@pytest.mark.parametrize(
    ("where", "case"),
    [
        (where, case)
        for where in ("around", "inside")
        for case in CASES
        if where == "inside" or case not in ALSO_IN_SHORT
    ],
)
def test_as_in_eager_code(case, where):
    name, context = CASES[case]
    model = build(name)
    expected = entered(lambda: context(model), model)
    if where == "around":
        check(entered(lambda: context(model), compiled(model)), expected, model)
    else:
        check(compiled(expected), expected, model)


TRANSFORMS = {
    "vmap": vmap,
    "vmap, out last": lambda f: vmap(f, out_dims=1),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(f), in_dims=1)(torch.stack([x, x * 2])),
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vmap(grad)": lambda f: vmap(grad(lambda x: f(x).sum())),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(x).sum()),
    "vjp": lambda f: lambda x: vjp(f, x)[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda x: f(x).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("where", ["around", "inside", "inside the transform"])
def test_with_transforms(name, where):
    model, transform = make("Mlp"), TRANSFORMS[name]

    def context():
        return capture(model, "blocks.1", "head@input[0]")

    def steered(x):
        with steer(model, "embed[..., 0]", torch.ones(())):
            return model(x)

    if where == "inside the transform":
        run = transform(lambda x: captured(model, "blocks.1")(x)[1]["blocks.1"] + steered(x)[..., :1])
        check(compiled(run), run, model)
    elif where == "inside":
        run = entered(context, transform(steered))
        check(compiled(run), run, model)
    else:
        run = transform(steered)
        check(entered(context, compiled(run)), entered(context, run), model)


@pytest.mark.parametrize("keep", ["first", "last", "all"])
def test_many_calls_in_one_context_are_compiled_a_few_times(keep):
    """Then never again, in other entries neither: what traced code reads does not depend on how full the cache is."""
    model = make("Thrice")
    run = compiled(model)
    for _ in range(2):
        with (
            capture(model, "block", keep=keep) as acts,
            capture(model, "block#1") as second,
            ablate(model, "block[:, 0]", steps=[1]),
        ):
            for step in range(12):
                run(inputs() + step)
        with (
            capture(model, "block", keep=keep) as expected,
            capture(model, "block#1") as expected_second,
            ablate(model, "block[:, 0]", steps=[1]),
        ):
            for step in range(12):
                model(inputs() + step)
        agree((acts, second), (expected, expected_second))
        assert graphs() <= 4
        assert len(acts.calls("block")) == (36 if keep == "all" else 1)


def test_a_list_of_calls_is_complete_wherever_it_is_read():
    model = make("Thrice")
    run = compiled(model)
    with capture(model, "block", keep="all") as acts:
        run(inputs())
        assert "3 × Tensor[5, 4]" in repr(acts)
        run(inputs())
        assert acts.nbytes == 6 * 5 * 4 * 4
        model(inputs())
        run(inputs())
        assert [len(calls) for calls in acts.select("*").values()] == [12]
    assert len(acts["block"]) == 12


def test_other_batch_sizes():
    model = make("Mlp")
    run = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in (5, 3, 8):
        x = torch.randn(size, 4)
        with steer(model, "embed[:, 0]", torch.ones(())), capture(model, "blocks.1[:, :2]", "head@input[0]") as acts:
            out = run(x)
        with (
            steer(model, "embed[:, 0]", torch.ones(())),
            capture(model, "blocks.1[:, :2]", "head@input[0]") as expected,
        ):
            agree(out, model(x))
        agree(acts, expected)
    assert graphs() == 1


@pytest.mark.parametrize("dynamic", [True, None])
def test_replacements_of_other_batch_sizes(dynamic):
    """Sizes that are known beside such as are not: of a value, and of what it takes the place of."""
    model, q = make("Mlp"), torch.linalg.qr(torch.randn(6, 2)).Q
    run = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)

    def around(size, stack):
        new = torch.linspace(-1, 1, size * 6).reshape(size, 6)
        with (
            patch(model, {"blocks.0": new, "blocks.1[:, 0]": new[:, 0], "embed": V}),
            patch(model, "blocks.2", new, subspace=q),
            steer(model, "blocks.1", new),
        ):
            return stack()

    for size in (5, 3, 8, 1):
        x = torch.randn(size, 4)
        agree(around(size, lambda x=x: run(x)), around(size, lambda x=x: model(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, as it leaves the frame
def test_a_value_that_does_not_fit_says_so_in_compiled_code_too():
    model, x, new = make("Mlp"), torch.randn(3, 4), torch.randn(3, 7)
    with pytest.raises(Exception, match=r"Tensor\[3, 7\].*does not broadcast"), patch(model, "blocks.0", new):
        torch.compile(model, fullgraph=True, backend="eager")(x)
    with pytest.raises(TreeMismatch, match=r"patch at 'blocks\.0': Tensor\[3, 7\]"), patch(model, "blocks.0", new):
        torch.compile(model, backend="eager")(x)


def test_a_stack_inside():
    model = make("Mlp")

    def run(x):
        with (
            steer(model, "embed", V),
            capture(model, "embed", "blocks.0") as first,
            ablate(model, "blocks.1[:, 0]"),
            capture(model, "blocks.1") as second,
        ):
            stacked = model(x)
        with capture(model) as third:
            clean = model(x)
        changes = first - third
        return stacked, first, second, clean, third, first["embed[:, 1]"], third.stack("blocks.*"), changes

    check(compiled(run), run, model)
    around = entered(lambda: ablate(model, "head"), compiled(run))
    torch._dynamo.utils.counters.clear()
    check(around, entered(lambda: ablate(model, "head"), run), model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functions_before_and_behind_a_break_of_the_graph(backend):
    """The graph of a part holds what was done to a function's result; run as Python, it calls that function again."""
    model = BreaksInTheMiddle()
    run = torch.compile(model, backend=backend)

    def around(f):
        with (
            edit(model, "@tanh()", lambda value: value * 2),
            capture(model, "@softmax()", "@tanh()", keep="all") as acts,
        ):
            return f(inputs()), acts["@softmax()"], acts["@tanh()"]

    for _ in range(2):
        agree(around(run), around(model))


def test_suspended_inside():
    model = make("Mlp")

    def run(x):
        with ablate(model, "embed"):
            ablated = model(x)
            with suspend(model), capture(model, "blocks.1") as acts:
                clean = model(x)
        return ablated, clean, acts

    check(compiled(run), run, model)
    assert torch.equal(run(inputs())[1], model(inputs()))


def test_fused_attention_as_steps_around():
    model = build("Fused")
    expected = entered(lambda: capture(model, FUSED + ".pattern"), model)(inputs())
    run = entered(lambda: capture(model, "@softmax()"), compiled(model))
    with fused_attention_as_steps():
        out, acts = run(inputs())
    agree((out, acts["@softmax()"]), (expected[0], expected[1][FUSED + ".pattern"]))
    assert torch.allclose(compiled(model)(inputs()), model(inputs()))


def test_a_gradient_to_what_was_put_in_inside():
    model = make("Mlp")

    def loss(vector, x):
        with steer(model, "blocks.1", vector), capture(model, "blocks.2") as acts:
            return model(x).sum() + acts["blocks.2"].sum()

    run = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(V, inputs()), grad(loss)(V, inputs()), atol=1e-5)


def test_what_is_not_reached_inside_is_an_error():
    model = make("Mlp")

    def run(x):
        with capture(model, "blocks.1#3") as acts:
            out = model(x)
        return out, acts

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"blocks\.1#3"):
        compiled(run)(inputs())
    with pytest.raises(Exception, match=r"no module matches 'nothing.\*' in Mlp"):
        compiled(captured(model, "nothing.*"))(inputs())


GLOBAL = make("Mlp")


def test_inside_around_and_a_model_that_is_a_global():
    """Dynamo meets the same objects by two ways, and guards only those that it can find again."""

    def run(x):
        with ablate(GLOBAL, "blocks.1"), capture(GLOBAL, "blocks.0") as acts:
            out = GLOBAL(x)
        return out, acts

    inside = compiled(run)
    check(inside, run, GLOBAL)
    for path in ("blocks.1", "blocks.0", "embed"):
        torch._dynamo.utils.counters.clear()
        check(
            entered(lambda path=path: steer(GLOBAL, path, V), inside),
            entered(lambda path=path: steer(GLOBAL, path, V), run),
            GLOBAL,
        )


PARTLY = {
    "model.forward": lambda model: setattr(model, "forward", compiled(model.forward)),
    "a part in place": lambda model: model.embed.compile(fullgraph=True, backend="eager"),
    "a part": lambda model: setattr(model, "embed", compiled(model.embed)),
    "all": lambda model: model.compile(fullgraph=True, backend="eager"),
}
# Each for a column of its own of what `embed` returns.
STEPS = [0, 1, [1, 3], slice(1, None), slice(0, None, 2), lambda step: step % 2 == 1]
BY_HAND = [{0}, {1}, {1, 3}, {1, 2, 3, 4, 5}, {0, 2, 4}, {1, 3, 5}]


@pytest.mark.parametrize("part", PARTLY)
def test_steps_are_counted_where_only_a_part_is_compiled(part):
    model, clean = make("Mlp"), make("Mlp").embed(inputs())
    PARTLY[part](model)

    def acted():
        with ExitStack() as stack:
            for column, steps in enumerate(STEPS):
                stack.enter_context(ablate(model, f"embed[:, {column}]", steps=steps))
            acts = stack.enter_context(capture(model, "embed"))
            return [(model(inputs()), (~acts["embed"].any(0)).tolist())[1] for _ in range(6)]

    expected = [[step in acting for acting in BY_HAND] for step in range(6)]
    assert clean.all()
    for _ in range(2):
        assert acted() == expected


@pytest.mark.parametrize("part", PARTLY)
def test_calls_are_counted_where_only_a_part_is_compiled(part):
    model = make("Mlp")
    PARTLY[part](model)
    for _ in range(2):
        with capture(model, "embed#0", "head#*") as acts:
            for _ in range(3):
                model(inputs())
        assert sorted(acts) == ["embed#0", "head#0"]


def test_steps_of_a_handle_in_two_threads():
    model = make("Mlp")
    model.embed.compile(fullgraph=True, backend="eager")
    handle = ablate(model, "embed", steps=0).attach()
    found = []

    def work():
        with capture(model, "embed") as acts:
            found.append([(model(inputs()), not acts["embed"].any())[1] for _ in range(3)])

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    handle.remove()
    assert found == [[True, False, False]] * 3


def test_a_thread_enters_and_leaves_while_another_one_compiles():
    model, found = make("Mlp"), []
    clean = model(inputs())
    run = compiled(model)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            with ablate(model, "head"), capture(model, "blocks.*"):
                found.append(model(inputs()).any().item())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(4):
            torch._dynamo.reset()
            assert torch.allclose(run(inputs()), clean)
    finally:
        stop.set()
        thread.join()
    assert found and not any(found)
