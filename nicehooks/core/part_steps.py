"""The rules that count the steps where the model itself is not called: by the outermost module that runs."""

from __future__ import annotations

from itertools import accumulate, chain

import torch
from torch import nn

from nicehooks import torch_private
from nicehooks.core.calling import has_forward
from nicehooks.core.census import module_at
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Pairs, add_around
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Progress
from nicehooks.core.steps import Deeper
from nicehooks.errors import UnsupportedModule


class PartStepRule(Rule):
    """Counts the steps where the root model does not run: a wrapper may call only a module inside of it.

    A step is then a call of the outermost module that runs. Of two of them one inside the other the outer one counts,
    which may come later (an encoder runs before the model around it does).

    Attributes:
        name: of the module.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def before(self, frame: Frame) -> None:
        self.session.called = True
        progress = self.session.progress()
        if not torch.compiler.is_compiling() and torch_private.in_backward():
            return
        if progress.rooted:
            self._beside_root(progress, frame)
            return
        if progress.depth == 0:
            self._begin(progress)
        frame.enter(Deeper(progress))

    def _beside_root(self, progress: Progress, frame: Frame) -> None:
        """A call alone belongs to the step before it; several of what the root model calls too may be steps of it."""
        if progress.depth > 0:
            progress.within[self.name] = True
            return
        if progress.part == self.name and self.name in progress.within and self.session.no_step is not None:
            raise UnsupportedModule(STEPS_OF_BOTH.format(label=self.session.label, name=self.name))
        progress.part = self.name
        frame.enter(Deeper(progress))

    def _begin(self, progress: Progress) -> None:
        part, name = progress.part, self.name
        if part is None or part.startswith(f"{name}."):
            progress.start()
            progress.part = name
        elif part != name:
            if name.startswith(f"{part}."):
                return
            if self.session.no_step is not None:
                raise UnsupportedModule(NO_STEPS.format(label=self.session.label, part=part, name=name))
        progress.next_step()


NO_STEPS = (
    "{label} counts steps, but the model itself is never called, and what is called in it are several modules: "
    "{part!r} and {name!r} are in no common one that runs.\n"
    "  A step is a call of the model: give the module that is called once in each.\n"
    '    steer(model.get_submodule("{name}"), …, steps=…)'
)

STEPS_OF_BOTH = (
    "{label} counts steps by the calls of the model, which has been called; now {name!r} in it is called again and "
    "again without it, as under a wrapper whose generate calls the model in it: nothing says which steps these are.\n"
    "  Enter the context anew before them, count anew, or give the module whose calls are the steps.\n"
    "    with steer(model, …, steps=…) as context: …; context.restart()\n"
    '    steer(model.get_submodule("{name}"), …, steps=…)'
)


def _part_step_rules(sites: list[Site], root: nn.Module, counting: bool) -> Pairs:
    """A rule for each module that `sites` are in, below the root model, and that can be called."""
    if not counting or torch.compiler.is_dynamo_compiling():
        return []
    ways = [accumulate(site.name.split("."), "{}.{}".format) for site in sites if site.name]
    modules = [(name, module_at(root, name)) for name in dict.fromkeys(chain.from_iterable(ways))]
    return [(module, PartStepRule(name)) for name, module in modules if module is not None and has_forward(module)]


add_around(_part_step_rules)
