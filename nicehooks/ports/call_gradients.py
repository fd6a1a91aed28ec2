"""The port `@name().grad`: the gradient of what a call in a module's own forward returns."""

from __future__ import annotations

from typing import Any

from torch import nn

from nicehooks.core.frames import Frame
from nicehooks.core.register import Pairs, register_port
from nicehooks.core.rules import Action
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.paths.ports import Port, Words
from nicehooks.ports.calls import STEPS, CallPort, CallRule, OtherForwardRule, others_below
from nicehooks.ports.gradients import NO_GRADIENT, ComesBack, watched_at
from nicehooks.values.trees import Chain


class CallGradientRule(CallRule):
    """The gradient of what is differentiated with respect to the result of a call, or to a step of fused attention."""

    __slots__ = ()
    companion = ComesBack
    reason = NO_GRADIENT

    def why_not_reached(self) -> str:
        return self.reason

    def on(self, frame: Frame, name: str, number: int, value: Any, chain: Chain | None = None) -> Any:
        key = self.key_of_call(frame, name, number)
        return value if key is None else watched_at(self, frame, key, value, self.chain, [])


class CallGradientPort(CallPort):
    """`@name().grad`, `@scaled_dot_product_attention().pattern.grad`: the gradient of that value."""

    kind = "call.grad"
    is_gradient = True
    rank = 3
    shown = "the gradient of a call name().grad"

    def read(self, words: Words) -> Port | None:
        part, dot, rest = words.part.rpartition(".")
        if not words.has_brackets or rest != "grad" or part not in ("", *STEPS) or (dot and not part):
            return None
        step = super().read(words._replace(part=part))
        return None if step is None else Port(self.kind, words.name, words.call, part)

    def written(self, port: Port) -> str:
        return f"{super().written(port)}.grad"

    def rules(self, site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
        others = [(other, OtherForwardRule()) for other in others_below(site.module)]
        return [(site.module, CallGradientRule(site, action, when)), *others]

    def rules_for_all(self, site: Site, action: Action) -> Pairs:
        return []  # what is listed are values, not their gradients


register_port(CallGradientPort())
