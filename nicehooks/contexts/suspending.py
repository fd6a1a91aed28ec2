"""suspend: a clean baseline inside of other contexts."""

from __future__ import annotations

import torch
from torch import nn

from nicehooks.contexts.intervention import Actions, Intervention, Plan
from nicehooks.core.calling import has_forward
from nicehooks.core.children import further_children, unwrap
from nicehooks.core.frames import Rule
from nicehooks.core.tap import has_rules


class _SuspendRule(Rule):
    """Silences the rules before it."""

    __slots__ = ()
    suspends = True


class suspend(Intervention):
    """Silences every intervention on `model` that was there before: inside it, the model is clean.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import ablate, capture
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> with ablate(model, "0"):
    ...     ablated = model(torch.ones(5, 4))
    ...     with suspend(model), capture(model, "0") as acts:
    ...         clean = model(torch.ones(5, 4))
    >>> ablated.any().item(), acts["0"].any().item()
    (False, True)

    What is entered inside it acts. It holds for this thread or task, as every context does.
    """

    verb = "suspend"
    plans_anew = True  # who is to be silenced may have changed

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def __repr__(self) -> str:
        return "suspend(model)"

    def _make_plan(self, actions: Actions | None = None) -> Plan:
        modules = list(unwrap(self.model).modules())
        modules += [method for module in modules for _, method in further_children(module)]
        if torch.compiler.is_dynamo_compiling():  # which traced rules there will be by then is only known there
            tapped = [module for module in modules if has_forward(module)]
        else:
            tapped = [module for module in modules if has_rules(module)]
        return Plan.of(repr(self), [(module, _SuspendRule()) for module in tapped])
