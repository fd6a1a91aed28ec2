"""What nicehooks says of itself alone, tried with each peer: compiled code, transforms, threads, batches.

    python benchmarks/peers/headlines.py NAME FOLDER OUT.json

`run.py` calls it, once for each peer. What is tried is a change and a capture: a vector added to the output of the
block in the middle, and the output of the block behind it seen. It is written for each peer in `with_….py`, `changing`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import measure
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

COMPILED, BATCH, THREADS = "compiled", "each example", "threads"
INSIDE, AROUND = "in transforms", "around transforms"
HEADLINES = {
    COMPILED: "the model is compiled with `fullgraph=True` and called; then a change and a capture are added, and then "
    "changed for others; "
    "the answers are right, and how many graphs were compiled for the two is said. A library that wraps the model is "
    "compiled as a whole where it is a module. By default torch does not look for hooks that are added after compiling",
    INSIDE: "a function with change and capture in it, of the vector, under `torch.func.vmap`, `grad`, `jvp` and "
    "`vmap` of `grad`",
    AROUND: "change and capture stand around a call of `torch.vmap(model)`, and the value is read behind it",
    THREADS: "while a thread is inside of a changed call, another calls the model bare, and with a change of its own: "
    "each gets its own answer",
    BATCH: "in one call, one example of a batch gets a patch at its last position, one a vector at all positions, one "
    "zeros, each at the block in the middle",
}
WAIT = 30.0  # seconds for the other thread, at most


class Unsaid(Exception):
    """A peer has no way to write it; the reason."""


def tell(trial: Callable[[], str]) -> str:
    """What came of it, in a few words."""
    try:
        return trial()
    except (Unsaid, NotImplementedError) as reason:
        return f"no: {reason}"
    except Exception as error:
        return (
            f"no: `{type(error).__name__}: {' '.join(str(error).split())[:80].translate(str.maketrans('|', '/', '`'))}`"
        )


def same(expected: Any, found: Any) -> bool:
    """Whether tensors, one or several, are equal to rounding."""
    if isinstance(expected, Tensor):
        return jobs.apart(expected, found) < measure.SAME
    return all(same(*pair) for pair in zip(expected, found, strict=True))


class Expected:
    """The answers, by raw hooks on a copy that no peer has touched."""

    def __init__(self, job: jobs.Job) -> None:
        self.job, self.names = job, (job.names[job.patched], job.names[job.patched + 1])
        self.clean = job.model(job.ids).logits

    def __call__(self, ids: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The logits under the change, and the value that is captured."""
        middle, behind = map(self.job.model.get_submodule, self.names)
        seen: list[Tensor] = []
        handles = [
            middle.register_forward_hook(lambda *call: call[-1] + vector),
            behind.register_forward_hook(lambda *call: seen.append(call[-1])),
        ]
        logits = self.job.model(ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits, seen[0]

    def examples(self) -> Tensor:
        """The logits of three examples, each with its intervention."""
        job, vector = self.job, self.job.direction
        hooks = [
            lambda value: torch.cat([value[:, :-1], job.clean[job.patched][:, -1:]], 1),
            lambda value: value + vector,
            lambda value: value * 0,
        ]
        rows: list[Tensor] = []
        for hook in hooks:
            handle = job.model.get_submodule(self.names[0]).register_forward_hook(
                lambda *call, hook=hook: hook(call[-1])
            )
            rows.append(job.model(job.ids).logits)
            handle.remove()
        return torch.cat(rows)


def compiled(given: jobs.Changing, job: jobs.Job, right: Expected) -> str:
    """A compiled model sees what is added afterwards, and what is changed."""
    counter = CompileCounter()
    torch._dynamo.reset()
    call = torch.compile(given.module, fullgraph=True, backend=counter)
    clean, graphs = call(job.ids, use_cache=False), []
    clean = getattr(clean, "logits", clean)
    for vector in (job.direction, -job.direction):
        before = counter.frame_count
        found = given.run(call, job.ids, vector)
        graphs.append(counter.frame_count - before)
        if same(clean, found[0]):
            return "no: the change is ignored"
        if not same(right(job.ids, vector), found):
            return "no: the answer is another"
    after = call(job.ids, use_cache=False)
    if not same(clean, getattr(after, "logits", after)):
        return "no: it stays changed"
    return f"yes; {graphs[0]} and {graphs[1]} graphs"


def inside(given: jobs.Changing, job: jobs.Job, right: Expected) -> str:
    """Transforms of a function with a change and a capture in it."""

    def over(run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def number(vector: Tensor) -> Tensor:
            logits, value = run(job.ids, vector)
            return job.metric(logits)[0] + value[0, -1].square().mean()

        return number

    function, plain = over(lambda ids, vector: given.run(None, ids, vector)), over(right)
    vectors, tangent = torch.stack([job.direction, -job.direction, job.direction * 0]), torch.ones_like(job.direction)
    with torch.enable_grad():
        leaves = [vector.clone().requires_grad_() for vector in vectors]
        gradients = torch.stack([torch.autograd.grad(plain(leaf), leaf)[0] for leaf in leaves])
        values = torch.stack([plain(vector).detach() for vector in vectors])
    trials: dict[str, tuple[Callable[[], Any], Any]] = {
        "vmap": (lambda: torch.vmap(function)(vectors), values),
        "grad": (lambda: torch.func.grad(function)(vectors[0]), gradients[0]),
        "jvp": (lambda: torch.func.jvp(function, (vectors[0],), (tangent,))[1], gradients[0].sum()),
        "vmap of grad": (lambda: torch.vmap(torch.func.grad(function))(vectors), gradients),
    }
    failed: dict[str, str] = {}
    with torch.enable_grad():
        for name, (trial, expected) in trials.items():
            said = tell(lambda trial=trial, expected=expected: "" if same(expected, trial()) else "no: another answer")
            failed |= {name: said.removeprefix("no: ")} if said else {}
    if not failed:
        return "yes"
    return f"no: {'all' if len(failed) == len(trials) else ', '.join(failed)}: {next(iter(failed.values()))}"


def around(given: jobs.Changing, job: jobs.Job, right: Expected) -> str:
    """A context around a call of the transformed model."""
    batch = torch.cat([job.ids, (job.ids + 1) % 1000, (job.ids + 2) % 1000])[:, None]
    mapped: Any = torch.vmap(lambda ids: logits_of(given.module(ids, use_cache=False)))
    expected = [torch.stack(each) for each in zip(*(right(ids, job.direction) for ids in batch), strict=True)]
    logits, value = given.run(lambda ids, **_: mapped(ids), batch, job.direction)
    if not same(expected[0], logits):
        return "no: another answer"
    return "yes" if same(expected[1], value) else "no: the captured value is another"


def logits_of(output: Any) -> Any:
    """The logits of a model that returns more, or those that it returns."""
    return getattr(output, "logits", output)


def threads(given: jobs.Changing, job: jobs.Job, right: Expected) -> str:
    """Two threads: one waits inside of its call until the other has made its two."""
    first, there, done = threading.get_ident(), threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    def wait(*_: Any) -> None:
        if threading.get_ident() == first and not there.is_set():
            there.set()
            done.wait(WAIT)

    def other() -> None:
        there.wait(WAIT)
        with torch.no_grad():
            try:
                found["bare"] = logits_of(job.model(job.ids, use_cache=False)).detach()
                found["own"] = given.run(None, job.ids, -job.direction)
            except Exception as error:
                found["error"] = error
            finally:
                done.set()

    handle = job.model.get_submodule(job.names[1]).register_forward_hook(wait)
    thread = threading.Thread(target=other)
    thread.start()
    try:
        mine = given.run(None, job.ids, job.direction)
    finally:
        there.set()
        thread.join()
        handle.remove()
    if "error" in found:
        raise found["error"]
    wrong = {
        "a bare call of the other is changed": same(right.clean, found["bare"]),
        "the change of the other is another": same(right(job.ids, -job.direction), found["own"]),
        "its own answer is another": same(right(job.ids, job.direction), mine),
    }
    return "; ".join(["yes"] if all(wrong.values()) else ["no", *(what for what, fine in wrong.items() if not fine)])


def examples(given: jobs.Changing, job: jobs.Job, right: Expected) -> str:
    """One call, three interventions."""
    if given.examples is None:
        raise Unsaid("not tried")
    return f"yes, {given.by}" if same(right.examples(), given.examples(job.ids.expand(3, -1))) else "no: another answer"


TRIALS = {COMPILED: compiled, INSIDE: inside, AROUND: around, THREADS: threads, BATCH: examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    facts = torch.load(options.folder / "facts.pt")
    peer: Any = importlib.import_module(f"with_{options.name}")
    said: dict[str, str] = {}
    for headline, trial in TRIALS.items():  # each on models of its own, so that none finds what another has left
        untouched, model = (jobs.load(options.folder).requires_grad_(False) for _ in range(2))
        for each in (untouched, model):
            each.set_attn_implementation("eager")  # fused attention has transforms of its own
        right = Expected(jobs.job_of("small", options.folder, untouched, facts))
        job = jobs.job_of("small", options.folder, model, facts)
        said[headline] = tell(lambda trial=trial, job=job, right=right: trial(peer.changing(job), job, right))
    date = datetime.date.today().isoformat()
    versions = {package: measure.version_of(package) for package in ("torch", "transformers", *peer.PACKAGES)}
    found = {"name": options.name, "date": date, "versions": versions, "said": said}
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
