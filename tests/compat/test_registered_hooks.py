"""The four `register_…` functions, beside PyTorch's own hooks."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo
from torch import nn
from worlds import inputs, make, same, unchanged

from nicehooks import (
    ModulePath,
    NotReachedWarning,
    SiteNotFound,
    SiteNotReached,
    TreeMismatch,
    UnsupportedModule,
    capture,
    describe,
    edit,
    register_forward_hook,
    register_forward_pre_hook,
    register_full_backward_hook,
    register_full_backward_pre_hook,
)

# --- beside PyTorch's own hooks ---------------------------------------------------------------------------------------

FORWARD = {
    "looks": lambda args, output: None,
    "changes": lambda args, output: tuple(o * 2 for o in output) if isinstance(output, tuple) else output * 2,
    "another tree": lambda args, output: (*output, 1) if isinstance(output, tuple) else output.double().float(),
}
PRE = {
    "looks": lambda args: None,
    "a tuple": lambda args: tuple(a * 2 for a in args),
    "a value": lambda args: args[0] * 3 if len(args) == 1 else None,
}
BACKWARD = {
    "looks": lambda given, *more: None,
    "changes": lambda given, *more: tuple(None if g is None else g * 2 for g in given),
}
KINDS = {
    "forward_hook": (register_forward_hook, FORWARD),
    "forward_pre_hook": (register_forward_pre_hook, PRE),
    "full_backward_hook": (register_full_backward_hook, BACKWARD),
    "full_backward_pre_hook": (register_full_backward_pre_hook, BACKWARD),
}
CASES = [(kind, name) for kind, (_, fns) in KINDS.items() for name in fns if name != "another tree"]


def compared(net, path, hooks, needs_gradient=True):
    """What PyTorch's hooks, and ours, were called with; and the gradients that came of each."""
    results = []
    for ours in (False, True):
        log, handles = [], []
        for number, (kind, fn, prepend) in enumerate(hooks):

            def hook(module, *given, fn=fn, number=number, ours=ours, log=log):
                if ours:
                    shown, *given = given
                    assert isinstance(shown, ModulePath) and str(shown) == path
                assert module is net.get_submodule(path)
                log.append((number, tuple(given)))
                return fn(*given)

            if ours:
                handles.append(KINDS[kind][0](net, path, hook, prepend=prepend))
            else:
                handles.append(getattr(net.get_submodule(path), f"register_{kind}")(hook, prepend=prepend))
        x = inputs().requires_grad_(needs_gradient)
        out = net(x)
        grads = torch.autograd.grad(out.sin().sum(), [*([x] if needs_gradient else []), *net.parameters()])
        for handle in handles:
            handle.remove()
        results.append((log, out, grads))
    return results


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PyTorch's own, where no input has a gradient
@pytest.mark.parametrize("path", ["", "first", "two", "two.inner", "relu"])
@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_hook_is_called_as_pytorch_calls_its_own(net, path, kind, name, needs_gradient):
    theirs, ours = compared(net, path, [(kind, KINDS[kind][1][name], False)], needs_gradient)
    if path in ("", "first") and not needs_gradient and (kind, name) == ("full_backward_hook", "changes"):
        assert theirs[0][0][1][0] == (None,)
    assert theirs[0] and same(theirs, ours)


@pytest.mark.parametrize("path", ["first", "two"])
@pytest.mark.parametrize("when", ["forward", "full_backward"])
def test_the_order_of_hooks_is_that_of_pytorch(net, path, when):
    cases = [(kind, name) for kind, name in CASES if kind.startswith(when)]
    hooks = [(kind, KINDS[kind][1][name], prepend) for prepend in (False, True) for kind, name in cases]
    theirs, ours = compared(net, path, hooks * 2)
    assert [number for number, _ in theirs[0]] == [number for number, _ in ours[0]]
    assert len(ours[0]) == len(hooks) * 2
    assert same(theirs, ours)


def test_an_output_may_become_another_tree(net):
    with register_forward_hook(net, "two", lambda module, path, args, output: (output[0], output[1] * 0)):
        out = net(inputs())
    assert torch.equal(out, net.relu(net.two(net.first(inputs()), net.first(inputs()) * 2, 0.5)[0]))
    with register_forward_hook(net, "", lambda module, path, args, output: {"out": output}):
        assert list(net(inputs())) == ["out"]


def test_with_keyword_arguments(net):
    x = net.first(inputs())
    log = []
    with (
        register_forward_pre_hook(net, "two", lambda m, p, args, kwargs: (args, {"scale": 3.0}), with_kwargs=True),
        register_forward_pre_hook(net, "two", lambda m, p, args, kwargs: log.append(kwargs), with_kwargs=True),
        register_forward_hook(net, "two", lambda m, p, args, kwargs, output: log.append(kwargs), with_kwargs=True),
        capture(net, "two") as acts,
    ):
        net(inputs())
    assert log == [{"scale": 3.0}, {"scale": 3.0}]
    assert torch.equal(acts["two"][0], net.two(x, x * 2, 3.0)[0])
    with pytest.raises(TreeMismatch, match=r"returns None or \(args, kwargs\), not"):
        with register_forward_pre_hook(net, "two", lambda m, p, args, kwargs: args, with_kwargs=True):
            net(inputs())


# --- paths with subscripts --------------------------------------------------------------------------------------------


def test_a_subscript_shows_and_changes_its_part_alone(net):
    seen = []

    def hook(module, path, args, output):
        seen.append((str(path), path.name, path.subscripts, args[0].shape, output.shape))
        return torch.ones(())

    with register_forward_hook(net, "first[:, 1:3]", hook), capture(net, "first") as acts:
        net(inputs())
    expected = net.first(inputs())
    expected[:, 1:3] = 1
    assert seen == [("first[:, 1:3]", "first", "[:, 1:3]", (5, 4), (5, 2))]
    assert torch.equal(acts["first"], expected)


def test_a_star_calls_the_hook_for_each_index(net):
    seen = []

    def hook(module, path, args, output):
        seen.append(path)
        return output * 0 + path.chain[0]

    with register_forward_hook(net, "first[*]", hook), capture(net, "first") as acts:
        net(inputs())
    assert seen == [ModulePath.parse(f"first[{i}]") for i in range(5)]
    assert acts["first"][:, 0].tolist() == [0, 1, 2, 3, 4]
    seen.clear()
    with register_forward_hook(
        net, "two[*]", lambda module, path, args, output: seen.append((str(path), output.shape))
    ):
        net(inputs())
    assert seen == [("two[0]", (5, 4)), ("two[1]", (5, 4))]


def test_a_subscript_before_a_forward_is_one_of_the_first_argument(net):
    seen = []

    def hook(module, path, args):
        seen.append((str(path), [a.shape for a in args]))
        return (args[0] * 0,)

    with register_forward_pre_hook(net, "two[*][1:]", hook), capture(net, "two@input") as acts:
        net(inputs())
    assert seen == [(f"two[{i}][1:]", [(3,)]) for i in range(5)]
    with edit(net, "two@input[0][:, 1:]", lambda value: value * 0), capture(net, "two@input") as expected:
        net(inputs())
    assert same(acts["two@input"], expected["two@input"])
    with register_forward_pre_hook(net.two, "[0]", lambda module, path, args: args[0] * 0):  # however it is passed
        by_name, by_position = net.two(y=inputs(), x=inputs()), net.two(inputs(), inputs())
    assert same(by_name, by_position) and not same(by_name, net.two(inputs(), inputs()))
    with pytest.raises(TreeMismatch, match="the hook was given one value, and returned"):
        with register_forward_pre_hook(net, "two[0]", lambda module, path, args: (args[0], args[0])):
            net(inputs())
    with pytest.raises(UnsupportedModule, match="Leave out with_kwargs, or the subscript"):
        register_forward_pre_hook(net, "two[0]", print, with_kwargs=True)
    assert not describe(net)


def test_subscripts_of_gradients(net):
    seen = []

    def zero(module, path, *gradients):
        seen.append((str(path), [[None if g is None else tuple(g.shape) for g in each] for each in gradients]))
        return gradients[0][0] * 0

    def grads(path, register):
        x = inputs().requires_grad_()
        with register(net, path, zero), capture(net, "two@grad", "two@input.grad", keep="all") as acts:
            net(x).sum().backward()
        return acts

    acts = grads("two[0][:, 1]", register_full_backward_pre_hook)
    assert seen == [("two[0][:, 1]", [[(5,)]])]
    assert not acts["two@grad[0]"][0][:, 1].any() and acts["two@grad[0]"][0][:, 0].any()
    acts = grads("two[1]", register_full_backward_pre_hook)
    assert not acts["two@grad[1]"][0].any() and acts["two@grad[0]"][0].any()
    seen.clear()
    acts = grads("two[:, *]", register_full_backward_hook)
    assert seen == [(f"two[:, {i}]", [[(5,)], [(5, 4), (5, 4)]]) for i in range(4)]
    assert not acts["two@input.grad['x']"][0].any() and acts["two@input.grad['y']"][0].any()


# --- handles ----------------------------------------------------------------------------------------------------------


def test_a_registered_hook_stays_until_it_is_removed(net):
    called = []
    clean = unchanged(net)
    handle = register_forward_hook(net, "first", lambda *given: called.append(threading.get_ident()))
    net(inputs())
    thread = threading.Thread(target=net, args=(inputs(),))  # in every thread
    thread.start()
    thread.join()
    assert len(set(called)) == 2
    assert str(describe(net)) == "first  register_forward_hook(model, 'first', …)  [attached]"
    handle.remove()
    handle.remove()
    net(inputs())
    assert len(called) == 2 and clean()
    with handle as same_one:
        assert same_one is handle
        net(inputs())
    assert len(called) == 3 and clean()


def test_handles_in_any_order_and_after_errors(net):
    clean = unchanged(net)
    one, two = (register_forward_hook(net, "*", lambda *given: None) for _ in range(2))
    net(inputs())
    one.remove()
    with pytest.raises(ZeroDivisionError), two:
        raise ZeroDivisionError
    assert clean() and not two.active


def test_a_handle_is_never_silent(net):
    for register in (register_forward_hook, register_forward_pre_hook, register_full_backward_hook):
        with pytest.raises(
            TypeError, match=rf"{register.__name__}\(model, path, hook\) takes a function as hook, not str"
        ):
            register(net, "first", "print")
        with pytest.raises(SiteNotFound, match=rf'{register.__name__}\(model, "first"'):
            register(net, "frist", print)
    with pytest.raises(SiteNotReached, match="Run backward inside the context"):
        with register_full_backward_hook(net, "first", lambda *given: None):
            net(inputs())
    handle = register_full_backward_pre_hook(net, "first", lambda *given: None)
    net(inputs())
    with pytest.warns(NotReachedWarning, match="no gradient came by"):
        handle.remove()


def test_prepended_hooks_come_before_every_intervention(net):
    with edit(net, "first", lambda value: value * 0), capture(net, "first") as acts:
        with register_forward_hook(net, "first", lambda module, path, args, output: output + 1, prepend=True):
            net(inputs())
        assert not acts["first"].any()
        with register_forward_hook(net, "first", lambda module, path, args, output: output + 1):
            net(inputs())
        assert not acts["first"].any()


def test_recursion_and_shared_modules_get_their_own_arguments():
    class Countdown(nn.Module):
        def forward(self, x, depth):
            return x if depth == 0 else self(x + 1, depth - 1)

    seen = []
    model = Countdown()
    with register_forward_hook(model, "", lambda module, path, args, output: seen.append(args[1])):
        model(torch.zeros(()), 3)
    assert seen == [0, 1, 2, 3]
    thrice, pairs = make("Thrice"), []
    with register_forward_hook(thrice, "block", lambda module, path, args, output: pairs.append((args[0], output))):
        thrice(inputs())
    assert all(torch.equal(thrice.block(x), y) for x, y in pairs)
    assert pairs[1][0] is pairs[0][1] and len(pairs) == 3
    with register_forward_hook(thrice, "block#1", lambda module, path, args, output: seen.append(str(path))):
        thrice(inputs())
    assert seen[4:] == ["block#1"]


def test_gradients_act_in_the_order_of_the_interventions(net):
    """Of one tensor and of several at once, in one line; also at an input."""
    for site, register in (("grad", register_full_backward_pre_hook), ("input.grad", register_full_backward_hook)):
        at = f"two@{site}[0]"
        with (
            capture(net, at) as before,
            edit(net, at, lambda value: value * 3),
            capture(net, at) as between,
            register(net, "two", lambda module, path, given, *more: tuple(g * 5 for g in given)),
            edit(net, at, lambda value: value * 7),
            capture(net, at) as after,
        ):
            net(inputs().requires_grad_()).sum().backward()
        (first,), (second,), (third,) = before.values(), between.values(), after.values()
        assert torch.equal(first * 3, second) and torch.allclose(second * 35, third) and third.any()


def test_a_tensor_that_comes_out_twice_has_two_gradients():
    class Twice(nn.Module):
        def forward(self, x):
            y = x.sin()
            return y, y

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            left, right = self.twice(x)
            return left * 2 + right * 3

    model, seen = Sum(), []
    with register_full_backward_pre_hook(model, "twice", lambda module, path, given: seen.extend(given)):
        model(torch.ones(4, requires_grad=True)).sum().backward()
    with capture(model, "twice@grad") as acts:
        model(torch.ones(4, requires_grad=True)).sum().backward()
    assert [gradient.unique().tolist() for gradient in seen] == [[2.0], [3.0]]
    assert acts["twice@grad[0]"].unique().tolist() == [2.0] and acts["twice@grad[1]"].unique().tolist() == [3.0]


def test_hooks_on_gradients_live_with_layers_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    x, seen = inputs().requires_grad_(), []
    with (
        register_full_backward_hook(model, "{0,2}", lambda module, path, given, *more: seen.append(str(path))),
        register_full_backward_pre_hook(model, "*", lambda module, path, given: seen.append(f"{path} pre")),
    ):
        model(x).sum().backward()
    assert seen == ["2 pre", "2", "1 pre", "0 pre", "0"]
    with pytest.raises(UnsupportedModule, match=r"1@input\.grad is of a module that overwrites its input"):
        with register_full_backward_hook(model, "*", lambda *given: None):
            model(x)


def test_a_wrong_gradient_says_so(net):
    for new, says in ((lambda g: (g[0],), "given 2 gradients, and returned 1 gradient"), (lambda g: (g[0], 3), None)):
        hook = register_full_backward_pre_hook(net, "two", lambda module, path, given, new=new: new(given))
        with hook:
            if says is None:
                net(inputs()).sum().backward()
                continue
            with pytest.raises(TreeMismatch, match=says):
                net(inputs()).sum().backward()
    with register_full_backward_hook(net, "first", lambda module, path, given, *more: (torch.ones(5, 4),)):
        with pytest.raises(TreeMismatch, match="came where there is no gradient"):
            net(inputs()).sum().backward()
