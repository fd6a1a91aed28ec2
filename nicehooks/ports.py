"""From a site to the rules that reach it: which kind of rule each port has, and at which modules."""

from __future__ import annotations

from torch import nn

from nicehooks.arguments import InputRule
from nicehooks.calls import call_rules
from nicehooks.errors import UnsupportedModule
from nicehooks.gradients import GradientRule, InputGradientRule
from nicehooks.rebinding import Rule
from nicehooks.rules import Action, OutputRule, RowsRule, SiteRule, SlowPathRule
from nicehooks.selection import Census, Site, has_forward
from nicehooks.steps import When
from nicehooks.trees import Rows
from nicehooks.weights import parameter_rules

Pairs = list[tuple[nn.Module, Rule]]

KINDS: dict[str, type[SiteRule]] = {
    "output": OutputRule,
    "input": InputRule,
    "grad": GradientRule,
    "input.grad": InputGradientRule,
}


def rules_for(site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
    """The rules that bring the values at `site` to `action`, each with the module whose tap it belongs to."""
    if any(isinstance(step, Rows) for step in site.path.chain):
        return [*_rules_at(site, action, when, root), (_around(site, root), RowsRule())]
    return _rules_at(site, action, when, root)


def _rules_at(site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
    kind = site.path.port.kind
    if kind == "parameter":
        return parameter_rules(site, action, when, root)
    if kind == "call":
        return call_rules(site, action, when)
    return [(site.module, KINDS[kind](site, action, when))]


def _around(site: Site, root: nn.Module) -> nn.Module:
    """The module around that of `site`."""
    outer, dot, _ = site.name.rpartition(".")
    around = Census(root).names.get(outer)
    if not site.name or around is None or (dot and not has_forward(around)):
        raise UnsupportedModule(f"{str(site)!r}: /rows needs a module around {site.name!r} that is called.")
    return around


def slow_path_rules(sites: list[Site]) -> Pairs:
    """A rule for each encoder that contains one of `sites`."""
    encoders = {id(encoder): encoder for site in sites if site._encoders for encoder in site.encoders}
    return [(encoder, SlowPathRule()) for encoder in encoders.values()]
