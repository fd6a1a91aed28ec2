"""The product of law 5: subjects × transforms × interventions, each with what it has to be equal to.

A subject runs a model on one example, moved by a small vector `z` of 3 numbers, and returns a small vector `y`: so
derivatives of any order are small too, whatever the model. An intervention makes a function `z -> y` of it. What a
transform makes of that function is compared with loops over examples and derivatives by plain autograd.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from gallery.architectures import gpt2, llama
from gallery.recurrent import Recurrent
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from worlds import make

from nicehooks import ActivationCache, capture, edit, patch

Fn = Callable[[Tensor], Tensor]


# --- subjects ---------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model, how to run it on one example, and the places in it that are looked at and changed.

    Attributes:
        seen: two paths to a few numbers each: a module (or a call of it), the way to a tensor, and a region in that.
        changed: the path that is written to.
    """

    model: nn.Module
    run: Callable[[Callable[..., Any], Tensor], Tensor]
    example: Tensor
    seen: list[tuple[str, str, str]]
    changed: str

    @property
    def paths(self) -> list[str]:
        return ["".join(parts) for parts in self.seen]

    def caller(self, name: str) -> Callable[..., Any]:
        """What stands for the model: itself, or `functional_call` with other parameters."""
        if name == "model":
            return self.model
        params = {name: value.detach() * 1.1 for name, value in self.model.named_parameters()}
        return lambda *args, **kwargs: functional_call(self.model, params, args, kwargs)

    def moved(self, z: Tensor) -> Tensor:
        """The example, moved by `z`."""
        spread = torch.linspace(-1, 1, 3 * self.example.numel(), dtype=torch.double).sin()
        return self.example + (z @ spread.view(3, -1)).view(self.example.shape)


def _small(model: nn.Module, seen: list[tuple[str, str, str]], changed: str) -> Subject:
    return Subject(model, lambda call, x: call(x)[..., :2], torch.ones(4), seen, changed)


def _language(model: nn.Module, blocks: str, heads: str) -> Subject:
    """A causal mask is given, because transformers looks at numbers to make one, which `linearize` cannot trace."""
    mask = torch.full((3, 3), -torch.inf, dtype=torch.double).triu(1)[None, None]

    def run(call: Callable[..., Any], x: Tensor) -> Tensor:
        out = call(inputs_embeds=x, attention_mask=mask, position_ids=torch.arange(3)[None], use_cache=False)
        return out.logits[0, -1, :2]

    seen = [(f"{blocks}.0", "", "[..., -1, :2]"), (f"{heads}@input", "[0]", "/4[..., 0, 1, :1]")]
    return Subject(model.eval(), run, torch.randn(1, 3, 32), seen, f"{blocks}.1[:, -1, :4]")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mlp": lambda: _small(
        make("Mlp"), [("blocks.1", "", "[..., :2]"), ("head@input", "[0]", "[..., 3]")], "embed[..., 1:3]"
    ),
    "tuples": lambda: _small(
        make("Nested"),
        [("nest", "[1]['a'][0]", "[..., 1:]"), ("inner", "", "[..., 0]")],
        "nest[2]['box']['content'][0]",
    ),
    "lstm": lambda: _small(
        Recurrent(), [("cell#0", "[1][1]", "[..., :2]"), ("cell#1", "[0]", "[..., 1]")], "cell[1][0][..., :2]"
    ),
    "gpt2": lambda: _language(gpt2(n_layer=2), "transformer.h", "transformer.h.1.attn.c_proj"),
    "llama": lambda: _language(llama(num_hidden_layers=2), "model.layers", "model.layers.1.self_attn.o_proj"),
}


@functools.cache
def subject(name: str) -> Subject:
    """A subject in double precision, so that comparisons can be strict."""
    torch.manual_seed(0)
    found = SUBJECTS[name]()
    return found._replace(model=found.model.double().requires_grad_(False), example=found.example.double())


CALLERS = ["model", "functional_call"]


# --- interventions ----------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A function of `z`, the same by plain autograd, and what is entered around whatever is done with it."""

    of: Fn
    by_hand: Fn
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def flat(acts: dict[str, Tensor]) -> list[Tensor]:
    return [value.reshape(-1) for value in acts.values()]


def loss(y: Tensor) -> Tensor:
    return y.sin().sum()


def _runner(s: Subject, caller: str) -> Fn:
    call = s.caller(caller)
    return lambda z: s.run(call, s.moved(z))


def _within(context: Callable[[Tensor], AbstractContextManager[Any]], run: Fn) -> Fn:
    def inside(z: Tensor) -> Tensor:
        with context(z):
            return run(z)

    return inside


def capture_inside(s: Subject, caller: str) -> Program:
    run = _runner(s, caller)

    def of(z: Tensor) -> Tensor:
        with capture(s.model, *s.paths) as acts:
            y = run(z)
        return torch.cat([y, *flat(acts)])

    return Program(of, of)


def capture_outside(s: Subject, caller: str) -> Program:
    run = _runner(s, caller)
    return Program(run, run, lambda: capture(s.model, *s.paths))


def patch_inside(s: Subject, caller: str) -> Program:
    inside = _within(lambda z: patch(s.model, s.changed, 0.5), _runner(s, caller))
    return Program(inside, inside)


def patch_outside(s: Subject, caller: str) -> Program:
    run = _runner(s, caller)
    return Program(run, run, lambda: patch(s.model, s.changed, torch.tensor(0.5)))


def mapped_patch(s: Subject, caller: str) -> Program:
    """The value depends on `z`, and the input does not."""
    run = _runner(s, caller)
    inside = _within(lambda z: patch(s.model, s.changed, z.sin().sum()), lambda z: run(torch.zeros_like(z.detach())))
    return Program(inside, inside)


def _bent(value: Tensor) -> Tensor:
    return value.sin() * 2


def edit_inside(s: Subject, caller: str) -> Program:
    inside = _within(lambda z: edit(s.model, s.changed, _bent), _runner(s, caller))
    return Program(inside, inside)


def edit_outside(s: Subject, caller: str) -> Program:
    run = _runner(s, caller)
    return Program(run, run, lambda: edit(s.model, s.changed, _bent))


def leaving(s: Subject, module: str, way: str) -> AbstractContextManager[Any]:
    """Makes what leaves a module there a tensor of its own: what the module itself computes from it does not count."""
    return edit(s.model, module + way, lambda value: value * 1)


def gradient_inside(s: Subject, caller: str) -> Program:
    """The gradient at a site, as a function of `z`."""
    run, (module, way, region) = _runner(s, caller), s.seen[0]
    port = f"{module}@grad{way}{region}"

    def of(z: Tensor) -> Tensor:
        with capture(s.model, port) as acts:
            grad(lambda z: loss(run(z)))(z)
        return acts[port].reshape(-1)

    def by_hand(z: Tensor) -> Tensor:
        with leaving(s, module, way), capture(s.model, module) as acts:
            y = loss(run(z if z.requires_grad else z.clone().requires_grad_()))
        (found,) = torch.autograd.grad(y, acts[module + way], create_graph=True)
        return ActivationCache({"found": found})["found" + region].reshape(-1)

    return Program(of, by_hand)


INTERVENTIONS = {
    "capture inside": capture_inside,
    "capture outside": capture_outside,
    "patch inside": patch_inside,
    "patch outside": patch_outside,
    "mapped patch value": mapped_patch,
    "edit inside": edit_inside,
    "edit outside": edit_outside,
    "gradient inside": gradient_inside,
}


# --- what it has to be equal to ---------------------------------------------------------------------------------------

BATCH = 2
EXAMPLES = torch.linspace(-0.4, 0.5, BATCH * BATCH * 3, dtype=torch.double).view(-1, 3).sin()
TANGENT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)


class Reference:
    """Values, Jacobians and second derivatives of a program, example by example, by plain autograd."""

    def __init__(self, program: Program) -> None:
        with program.around():
            self.values = torch.stack([program.by_hand(z).detach() for z in EXAMPLES])
            self.jacobians = torch.stack([jacobian(program.by_hand, z) for z in EXAMPLES[:BATCH]])
            self.hessian = jacobian(lambda z: gradient(program.by_hand, z), EXAMPLES[0])
        self.gradients = torch.einsum("by,byz->bz", self.values[:BATCH].cos(), self.jacobians)


def jacobian(f: Fn, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    rows = [torch.autograd.grad(y, z, retain_graph=True, materialize_grads=True)[0] for y in _tied(f(z), z)]
    return torch.stack(rows)


def gradient(f: Fn, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss(_tied(f(z), z)), z, create_graph=True)[0]


def _tied(y: Tensor, z: Tensor) -> Tensor:
    """`y` as a function of `z`, also where it does not depend on it."""
    return y + 0 * z.sum()


@functools.cache
def reference(name: str, intervention: str, caller: str) -> Reference:
    return Reference(INTERVENTIONS[intervention](subject(name), caller))


# --- transforms -------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """What is done with a program, and what comes out by hand.

    Attributes:
        lead: the mapped dimensions that a cache entered around it gets: those of a batch of examples, or, of one
            example, a row for each direction that a derivative is taken in.
        gradients: what an `@grad` port around it gets, of the Jacobians at the site and the values of each example;
            None where no backward runs.
    """

    of: Callable[[Fn], Any]
    by_hand: Callable[[Reference], Any]
    lead: tuple[int, ...] = ()
    gradients: Callable[[Tensor, Tensor], Tensor] | None = None


def _cotangent(y: Tensor) -> Tensor:
    return torch.linspace(1, 2, len(y), dtype=torch.double)


def _vjp(f: Fn) -> Any:
    y, pull = vjp(f, EXAMPLES[0])
    return y, pull(_cotangent(y))[0]


def _linearize(f: Fn) -> Any:
    with warnings.catch_warnings():  # torch's own, about the graph that it has made itself
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        y, push = linearize(f, EXAMPLES[0])
    return y, push(TANGENT)


def _nested(f: Fn) -> Any:
    return vmap(vmap(f))(EXAMPLES.view(BATCH, BATCH, 3))


def _pushed(r: Reference) -> Any:
    return r.values[0], r.jacobians[0] @ TANGENT


def _of_loss(at_site: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("by,by...->b...", values.cos(), at_site)[:BATCH]


TRANSFORMS = {
    "vmap": Transform(lambda f: vmap(f)(EXAMPLES[:BATCH]), lambda r: r.values[:BATCH], (BATCH,)),
    "vmap(vmap)": Transform(_nested, lambda r: r.values.view(BATCH, BATCH, -1), (BATCH, BATCH)),
    "grad": Transform(
        lambda f: grad(lambda z: loss(f(z)))(EXAMPLES[0]),
        lambda r: r.gradients[0],
        gradients=lambda at_site, values: _of_loss(at_site, values)[0],
    ),
    "vjp": Transform(
        _vjp,
        lambda r: (r.values[0], _cotangent(r.values[0]) @ r.jacobians[0]),
        gradients=lambda at_site, values: torch.einsum("y,y...->...", _cotangent(values[0]), at_site[0]),
    ),
    "jvp": Transform(lambda f: jvp(f, (EXAMPLES[0],), (TANGENT,)), _pushed),
    "jacrev": Transform(
        lambda f: jacrev(f)(EXAMPLES[0]),
        lambda r: r.jacobians[0],
        gradients=lambda at_site, values: at_site[0],
    ),
    "jacfwd": Transform(lambda f: jacfwd(f)(EXAMPLES[0]), lambda r: r.jacobians[0], (3,)),
    "hessian": Transform(
        lambda f: hessian(lambda z: loss(f(z)))(EXAMPLES[0]),
        lambda r: r.hessian,
        (3,),
        gradients=lambda at_site, values: _of_loss(at_site, values)[0].expand(3, 1, *at_site.shape[2:]),
    ),
    "vmap(grad)": Transform(
        lambda f: vmap(grad(lambda z: loss(f(z))))(EXAMPLES[:BATCH]),
        lambda r: r.gradients,
        (BATCH,),
        gradients=_of_loss,
    ),
    "grad(vmap)": Transform(
        lambda f: grad(lambda z: loss(vmap(f)(z)))(EXAMPLES[:BATCH]),
        lambda r: r.gradients,
        (BATCH,),
        gradients=_of_loss,
    ),
    "vmap(jacrev)": Transform(
        lambda f: vmap(jacrev(f))(EXAMPLES[:BATCH]),
        lambda r: r.jacobians,
        (BATCH,),
        gradients=lambda at_site, values: at_site[:BATCH],
    ),
    "linearize": Transform(_linearize, _pushed),
}


def combinations(*columns: Any) -> list[Any]:
    """Parameters for pytest: every transform, each of `columns`, every subject, every caller.

    One rule leaves some out: `linearize` traces and folds a graph of every operation, which takes two seconds for a
    language model. So it gets every model as it is, and of the language models GPT-2, which makes that slow.
    """
    found: list[Any] = []
    for transform, *rest, name, caller in itertools.product(TRANSFORMS, *columns, SUBJECTS, CALLERS):
        traced = transform == "linearize" and name in ("gpt2", "llama")
        if transform != "linearize" or (caller == "model" and name != "llama"):
            values = (transform, *rest, name, caller)
            marks = [pytest.mark.slow] if traced else []
            found.append(pytest.param(*values, id="-".join(values), marks=marks))
    return found
