"""From a site to the rules that reach it: which kind of rule each port has, and at which modules."""

from __future__ import annotations

from torch import nn

from nicehooks.core.rules import Action, OutputRule, RowsRule, SiteRule, SlowPathRule
from nicehooks.core.selection import Census, Site, has_forward
from nicehooks.core.tap import Rule
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.ports.arguments import InputRule
from nicehooks.ports.calls import call_rules
from nicehooks.ports.gradients import GradientRule, InputGradientRule
from nicehooks.ports.uses import use_rules
from nicehooks.ports.weights import parameter_rules
from nicehooks.values.trees import Rows

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
    if kind in ("use", "use.grad"):
        return use_rules(site, action, when, root)
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
