"""Random programs of many kinds, many and cheap: `make fuzz N=100000`, or `python tests/fuzz.py N --seed SEED`.

A program is told again by its seed and number alone. What it does is compared with the same done by hand: interventions
with `reference.py`, containers with the same function of each leaf, threads with a thread alone, a compiled model with
the plain one. Interrupted programs (`--kind interrupts`) want a process of their own: what they check is what is left.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import secrets
import sys
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gallery.mixed import Summed, total
from gallery.values import Box, Pair
from machine import VERBS, model_called
from reference import FORWARDS
from stress import Stress
from torch import Tensor, nn
from torch.func import grad, vmap
from transformers.modeling_outputs import BaseModelOutput
from worlds import state

from nicehooks import ablate, capture, captured, describe, edit, patch, steer
from nicehooks.values import trees

# --- stacks of interventions, against the reference -------------------------------------------------------------------


@cache
def prepared(name: str) -> tuple[nn.Module, nn.Module]:
    return model_called(name), model_called(name)


class Program(Stress):
    """One run of the machine, whose steps a generator of random numbers draws; the next has the same model again."""

    collects = False

    def models(self, name: str) -> tuple[nn.Module, nn.Module]:
        return prepared(name)

    def step(self, rng: random.Random) -> None:
        thread = rng.choice([0, 0, 0, 1])
        kind = rng.choices(list(STEPS), list(STEPS.values()))[0]
        if kind == "enter":
            self.enter(rng, thread, rng.random() < 0.2, rng.choice(sorted(VERBS)))
        elif kind == "capture":
            self.enter_capture(rng, thread, rng.random() < 0.2, rng.randint(0, 4))
        elif kind == "suspend":
            self.enter_suspend(thread)
        elif kind == "leave" and self.entered:
            self.leave(rng.choice(self.entered), thread, rng.choice(["exit", "raise", "remove"]))
        elif kind == "backward":
            self.run_forward_and_backward(thread, rng.randint(0, 3))
        elif kind == "vmap":
            self.run_vmap(thread, rng.randint(0, 3), rng.random() < 0.5, rng)
        elif kind == "grad":
            self.run_grad(thread, rng.randint(0, 3))
        else:
            self.run(thread, rng.randint(0, 3), rng.choice(["", "no_grad"]))


STEPS = {"enter": 25, "capture": 15, "suspend": 3, "leave": 14, "run": 15, "backward": 20, "vmap": 4, "grad": 4}


def stack(rng: random.Random) -> None:
    """Interventions of every verb, entered and left in any order, in two threads, between runs and backwards."""
    program: Any = Program()
    program.begin(rng.choice(sorted(FORWARDS)), rng)
    try:
        for _ in range(rng.randint(3, 8)):
            program.step(rng)
    finally:
        program.teardown()


# --- containers in and out of transforms ------------------------------------------------------------------------------

MADE: list[Callable[[Any, Any], Any]] = [
    lambda a, b: (a, b),
    lambda a, b: [a, b],
    lambda a, b: {"a": a, "b": b},
    lambda a, b: OrderedDict(b=b, a=a),
    lambda a, b: Pair(a, b),
    lambda a, b: Box((a, b)),
    lambda a, b: deque([a, b]),
    lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b,)),
    lambda a, b: (a, None, b),
    lambda a, b: {"a": a, "n": 3, "b": [b]},
]


def made(rng: random.Random, depth: int) -> Callable[..., Any]:
    """A function from a tensor to a nested value, each leaf of which is something else, with a change of each leaf."""
    factor = rng.randint(1, 5)
    if depth == 0:
        return lambda x, change=torch.positive: change(x * factor)
    kind, a, b = rng.choice(MADE), made(rng, rng.randint(0, depth - 1)), made(rng, depth - 1)
    return lambda x, change=torch.positive: kind(a(x, change), b(x, change))


def triple(leaf: Tensor) -> Tensor:
    return leaf * 3


CHANGES: dict[str, tuple[Callable[[nn.Module, Callable[..., Any], Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "none": (lambda model, make, x: capture(model, "nest"), torch.positive),
    "ablate": (lambda model, make, x: ablate(model, "nest"), torch.zeros_like),
    "edit": (lambda model, make, x: edit(model, "nest", lambda tree: trees.map_tensors(torch.exp, tree)), torch.exp),
    "patch": (lambda model, make, x: patch(model, "nest", make(x * 2, triple)), triple),
    "itself": (lambda model, make, x: edit(model, "nest", lambda tree: tree), torch.positive),
}
WORLDS = ("eager", "no_grad", "outside of vmap", "inside of vmap", "grad", "backward")


def container(rng: random.Random) -> None:
    """A nested value of any kinds, changed and captured, whole, in and out of transforms."""
    make, world, name = made(rng, rng.randint(1, 3)), rng.choice(WORLDS), rng.choice(sorted(CHANGES))
    model = Summed(make)
    before, x = state(model), torch.randn(2, 3, generator=torch.Generator().manual_seed(rng.randint(0, 9)))
    context, change = CHANGES[name]
    by_hand = lambda x: total(make(x * 2, change))  # noqa: E731
    if world == "inside of vmap":
        x = x[:1].expand(2, 3) if name == "patch" else x
        with context(model, make, x[0]):
            out, acts = vmap(captured(model, "nest"))(x)
        same(out, vmap(by_hand)(x))
    else:
        with context(model, make, x), capture(model, "nest") as acts:
            run_in(world, model, by_hand, x, name)
    same_tree(acts["nest"], make(x * 2, change))
    same(model(x), total(make(x * 2)))
    assert state(model) == before and not describe(model)


def run_in(world: str, model: nn.Module, by_hand: Callable[[Tensor], Tensor], x: Tensor, name: str) -> None:
    if world == "outside of vmap" and name != "patch":
        same(vmap(model)(x), vmap(by_hand)(x))
    elif world == "no_grad":
        with torch.no_grad():
            same(model(x), by_hand(x))
    elif world == "grad" and name != "patch":
        same(grad(lambda x: model(x).sum())(x), grad(lambda x: by_hand(x).sum())(x))
    elif world == "backward" and name != "patch":
        a, b = (x.clone().requires_grad_() for _ in range(2))
        outs = model(a), by_hand(b)
        assert outs[0].requires_grad == outs[1].requires_grad
        for out in outs:
            if out.requires_grad:
                out.sum().backward()
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            same(a.grad, b.grad)
    else:
        same(model(x), by_hand(x))


def same(found: Any, expected: Any) -> None:
    assert torch.allclose(found, expected, atol=1e-5), (found, expected)


def same_tree(found: Any, expected: Any) -> None:
    """The same kinds of containers, with the same leaves."""
    assert trees.structure_of(found) == trees.structure_of(expected)
    for a, b in zip(trees.leaves(found), trees.leaves(expected), strict=True):
        assert torch.allclose(a, b, atol=1e-5) if isinstance(a, Tensor) else a == b


# --- threads ----------------------------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))


SHARED, X = chain(), torch.linspace(-1, 1, 12).view(3, 4)
PATHS = ["0", "1", "2", "2.0", "2.1", "3", "2.0@weight", "0@bias", "3@input[0]", "1[:, 1]"]
MAKERS: list[Callable[[Any, str, float], Any]] = [
    lambda model, path, number: ablate(model, path),
    lambda model, path, number: patch(model, path, number),
    lambda model, path, number: edit(model, path, lambda value: value * number),
    lambda model, path, number: steer(model, path, torch.tensor(number)),
    lambda model, path, number: capture(model, path),
]


def a_job(rng: random.Random) -> list[Any]:
    return [(rng.choice(MAKERS), rng.choice(PATHS), rng.uniform(0.5, 2)) for _ in range(rng.randint(1, 3))]


def crowd(rng: random.Random) -> None:
    """Threads that enter, run and leave at one time, on one model: each as if it were alone."""
    jobs = [
        [(rng.choice(MAKERS), rng.choice(PATHS), rng.uniform(0.5, 2)) for _ in range(rng.randint(1, 3))] for _ in "123"
    ]
    alone = [work(job) for job in jobs]
    found: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        found[number] = [work(jobs[number]) for _ in range(2)]

    crowd = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    for expected, outs in zip(alone, found, strict=True):
        assert outs is not None and all(torch.equal(out, expected) for out in outs)
    assert not describe(SHARED) and [list(vars(module)) for module in SHARED.modules()] == CLEAN_NAMES


CLEAN_NAMES = [list(vars(module)) for module in SHARED.modules()]


def work(job: list[Any], model: Any = None) -> Tensor:
    model = SHARED if model is None else model
    contexts = [maker(model, path, number) for maker, path, number in job]
    with torch.no_grad():
        for context in contexts:
            context.__enter__()
        out = model(X)
        for context in contexts:
            context.__exit__(None, None, None)
    return out


# --- compiled models with in-place layers -----------------------------------------------------------------------------


def compiled(rng: random.Random) -> None:
    """A compiled model whose layers write into what was captured: as the plain one, or an error that says so."""
    layers = [
        rng.choice([nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Tanh(), nn.Hardtanh(inplace=True)]) for _ in "1234"
    ]
    model = nn.Sequential(nn.Linear(4, 4), *layers)
    job = [(rng.choice(MAKERS[:4]), str(rng.randint(0, 4)), rng.uniform(0.5, 2)) for _ in range(rng.randint(1, 2))]
    torch._dynamo.reset()  # each program is new code
    run = torch.compile(model, backend="eager", fullgraph=True)
    places = rng.sample(range(5), 2)
    with torch.no_grad():
        with capture(model, *map(str, places)) as seen, capture(model, *map(str, places), clone=True) as kept:
            plain = work_around(job, model, model)
        with capture(model, *map(str, places)) as acts:
            found = work_around(job, model, run)
        same(found, plain)
        same(run(X), model(X))
    for place in map(str, places):
        assert read(acts, place) == read(seen, place)
        if read(acts, place) != "StaleActivation":
            same(acts[place], kept[place])


def work_around(job: list[Any], model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    return work_under(made_for(model, job), run)


def made_for(model: nn.Module, job: list[Any]) -> list[Any]:
    return [maker(model, path, number) for maker, path, number in job]


def work_under(contexts: list[Any], run: Callable[[Tensor], Tensor]) -> Tensor:
    for context in contexts:
        context.__enter__()
    out = run(X.clone())
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    return out.clone()


def read(acts: Any, key: str) -> str:
    try:
        acts[key]
    except Exception as error:
        return type(error).__name__
    return ""


# --- interrupts at any line -------------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at one line of the library, or of the part of it that is `within`, counted from 1."""

    def __init__(self, at: int, within: str = "/nicehooks/") -> None:
        self.left = at
        self.within = within

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if self.within not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted(rng: random.Random) -> None:
    """Entering, running and leaving, interrupted; `remove()` then leaves the model as it was, and no lock held."""
    job = a_job(rng)
    interrupted_once(chain(), lambda model: made_for(model, job), Interrupt(rng.randint(1, 900)))


def interrupted_once(model: nn.Module, make: Callable[[nn.Module], list[Any]], interrupt: Interrupt) -> None:
    clean, before = model(X), state(model)
    other = copy.deepcopy(model)
    under = work_under(make(other), other)
    contexts, tracer = make(model), sys.gettrace()  # coverage, say
    sys.settrace(interrupt)
    try:
        for context in contexts:
            context.__enter__()
        model(X).sum().backward()
        for context in reversed(contexts):
            context.__exit__(None, None, None)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for context in contexts:
            context.remove()
    model.zero_grad(set_to_none=True)
    assert state(model) == before and not describe(model), "the model is tapped still"
    assert torch.equal(work_under(contexts, model), under), "a context that was interrupted does not serve again"
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(after_an_ablation(model)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert found, "another thread waits for a lock"
    assert torch.equal(found[0], clean) and torch.equal(model(X), clean)


def after_an_ablation(model: nn.Module) -> Tensor:
    with ablate(model, "1"):
        model(X)
    return model(X)


# --- many of them -----------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[random.Random], None], int]] = {
    "stack": (stack, 25),
    "container": (container, 70),
    "crowd": (crowd, 5),
}
"""The programs of a mixture, and how many of a hundred are of each kind."""
ALONE = {"interrupts": interrupted, "compiled": compiled}


def run_programs(count: int, seed: int, kind: str = "") -> None:
    """Runs `count` programs; the error of one says how to run it again."""
    gc.collect()
    gc.freeze()  # what was there before is not looked through again and again: for good, as in conftest.py
    for number in range(count):
        run_program(seed, number, kind)
        if number % 100 == 99:
            gc.collect()


def run_program(seed: int, number: int, kind: str = "") -> None:
    rng = random.Random(f"{seed} {number}")
    drawn = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]  # always, so that the rest is the same
    chosen = kind or drawn
    program = ALONE[chosen] if chosen in ALONE else KINDS[chosen][0]
    try:
        program(rng)
    except BaseException:
        print(f"again: python tests/fuzz.py --seed {seed} --only {number} --kind {chosen}", file=sys.stderr)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Random programs against the same by hand.")
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, help="the number of the one program to run")
    parser.add_argument("--kind", default="", choices=["", *KINDS, *ALONE])
    wanted = parser.parse_args()
    seed = secrets.randbelow(10**6) if wanted.seed is None else wanted.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if wanted.only is not None:
        run_program(seed, wanted.only, wanted.kind)
    else:
        run_programs(wanted.count, seed, wanted.kind)
    print("all agree")


if __name__ == "__main__":
    main()
