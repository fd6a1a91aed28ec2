"""Normalization in its steps: what a norm computes at once, as values that hooks can reach.

NOTE [A norm in its steps]
A norm is one fused call, or one expression, so there is nothing in it that a path could name. Where a step is hooked,
it is computed anew from the input, in the place of what the module has returned, before anything acts on that: so what
was entered earlier and changes the output of the norm still does. If no hook changes a step, the module's own result
stands, bit for bit.

NOTE [Which formula]
Norms have many classes and few formulas: with a mean or without, with `weight` or `1 + weight` as the gain. Which one
it is, is found by trying them on an input of our own, once for each entry. A class that fits none is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nicehooks.core.frames import Frame
from nicehooks.core.rules import Action, SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.ports.arguments import arguments_of

NORM_STEPS = ("post_mean_subtraction", "scale", "post_scale")
"""The steps of a norm, in order: `x - mean`, `sqrt(var + eps)`, and their ratio, before the gain and the bias."""


class NormFormula(NamedTuple):
    """How a norm computes its result.

    Attributes:
        eps: what is added to the variance, or to the mean square; None for the smallest step of the dtype.
        centred: whether the mean is subtracted (LayerNorm; not RMSNorm).
        offset: what is added to the weight to make the gain.
    """

    eps: float | None
    centred: bool
    offset: float

    def scale_of(self, centred: Tensor) -> Tensor:
        """`sqrt(mean(x²) + eps)`, `[..., 1]`."""
        eps = torch.finfo(centred.dtype).eps if self.eps is None else self.eps
        return (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def finished(self, module: Any, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """`normalized` with gain and bias."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        value = normalized if weight is None else normalized * (weight.to(normalized.dtype) + self.offset)
        return (value if bias is None else value + bias.to(value.dtype)).to(dtype)


class NormRule(SiteRule):
    """Brings one step of a norm to an action; see NOTE [A norm in its steps]."""

    __slots__ = ("formula", "step")

    def __init__(self, site: Site, action: Action, when: When, step: str, formula: NormFormula) -> None:
        super().__init__(site, action, when)
        self.step = step
        self.formula = formula

    def before(self, frame: Frame) -> None:
        self.number(frame)
        if frame.inside is None:
            frame.inside = _NormInSteps(self.formula)
        frame.inside.rules.append(self)

    def after(self, frame: Frame) -> None:
        pass


class _NormInSteps:
    """One call of a norm, for all the rules on its steps, in their order."""

    def __init__(self, formula: NormFormula) -> None:
        self.formula = formula
        self.rules: list[NormRule] = []

    def __call__(self, frame: Frame) -> Any:
        names, _ = frame.tap.parameters
        x = arguments_of(names, frame.args, frame.kwargs)[0]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as the norms themselves do
        kept: list[Tensor] = []
        if self.formula.centred:
            wide = self._through("post_mean_subtraction", wide - wide.mean(-1, keepdim=True), frame, kept)
        scale = self._through("scale", self.formula.scale_of(wide), frame, kept)
        normalized = self._through("post_scale", wide / scale, frame, kept)
        if not kept:  # in this call no rule acts
            return frame.value
        return unless_kept(kept, frame.value, self.formula.finished(frame.module, normalized, frame.value.dtype))

    def _through(self, step: str, value: Tensor, frame: Frame, kept: list[Tensor]) -> Tensor:
        """`value` behind the rules on `step`; whether it has kept its values goes to `kept`."""
        rules = [rule for rule in self.rules if rule.step == step and rule.key_of(frame) is not None]
        if not rules:
            return value
        new = value.clone()
        for rule in rules:
            new = rule.through(frame, new)
        kept.append(has_kept(value, new))
        return new


# --- changed or not ---------------------------------------------------------------------------------------------------


def has_kept(old: Tensor, new: Tensor) -> Tensor:
    """Whether `new` has the values of `old`, as a tensor: transforms and graphs ask no value for its truth."""
    old, new = old.detach(), new.detach()
    return ((new == old) | (new.isnan() & old.isnan())).all()


def unless_kept(kept: Sequence[Tensor], own: Tensor, made: Tensor) -> Tensor:
    """`made`, with the values of `own` if all of `kept` are true; its gradient is that of `made` in any case."""
    if torch.compiler.is_compiling():  # which rounds in its own way
        return made
    return _Valued.apply(made, torch.where(torch.stack(list(kept)).all(), own.detach(), made.detach()))


class _Valued(torch.autograd.Function):
    """A tensor with other values, and its own gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Tensor, values: Tensor) -> Tensor:  # pyright: ignore
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # pyright: ignore
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore
        return tangent.clone()


# --- which formula ----------------------------------------------------------------------------------------------------

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon")


def formula_of(module: nn.Module) -> NormFormula:
    """How `module` normalizes; see NOTE [Which formula].

    Raises:
        UnsupportedModule: it is none of the known ways.
    """
    eps: Any = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), None)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return NormFormula(eps, True, 0.0)
    for formula in [NormFormula(eps, centred, offset) for centred in (True, False) for offset in (0.0, 1.0)]:
        if _is_formula_of(formula, module):
            return formula
    raise UnsupportedModule(UNKNOWN_NORM.format(kind=type(module).__name__))


def _is_formula_of(formula: NormFormula, module: nn.Module) -> bool:
    """Whether `formula` gives what `module` does, on an input whose mean is not zero."""
    example: Any = next(iter(module.parameters(recurse=False)), torch.empty(getattr(module, "normalized_shape", (8,))))
    size = example.shape[-1]
    x = torch.linspace(-1, 2, 2 * size, dtype=torch.float64).sin().reshape(1, 2, size) + 0.5
    x = x.to(device=example.device, dtype=example.dtype)
    try:
        with torch.no_grad():
            expected: Any = type(module).forward(module, x)  # the class's own: no intervention acts on it
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            wide = wide - wide.mean(-1, keepdim=True) if formula.centred else wide
            found = formula.finished(module, wide / formula.scale_of(wide), expected.dtype)
            return bool(torch.allclose(found, expected, rtol=0.05 if x.dtype != wide.dtype else 1e-4, atol=1e-4))
    except (RuntimeError, TypeError, AttributeError, IndexError):  # it takes other inputs, or returns something else
        return False


UNKNOWN_NORM = (
    "{kind} is no normalization whose steps are known: neither that of nn.LayerNorm nor that of an RMSNorm, with "
    "weight or 1 + weight as its gain. Its whole result can be hooked: .post_ln_attn, .post_ln_mlp, .post_ln_f."
)
