"""From a site to the rules that reach it, and to those that stand around it."""

from __future__ import annotations

from torch import nn

from nicehooks.core.calling import has_forward
from nicehooks.core.register import Pairs, kind_of
from nicehooks.core.rules import Action, RowsRule, SlowPathRule
from nicehooks.core.selection import Site
from nicehooks.core.walking import module_at
from nicehooks.core.when import When
from nicehooks.errors import UnsupportedModule
from nicehooks.values.regions import Rows


def rules_for(site: Site, action: Action, when: When, root: nn.Module) -> Pairs:
    """The rules that bring the values at `site` to `action`, each with the module whose tap it belongs to."""
    pairs = kind_of(site.path.port).rules(site, action, when, root)
    if any(isinstance(step, Rows) for step in site.path.chain):
        return [*pairs, (_around(site, root), RowsRule())]
    return pairs


def _around(site: Site, root: nn.Module) -> nn.Module:
    """The module around that of `site`."""
    outer, dot, _ = site.name.rpartition(".")
    around = module_at(root, outer)
    if not site.name or around is None or (dot and not has_forward(around)):
        raise UnsupportedModule(f"{str(site)!r}: /rows needs a module around {site.name!r} that is called.")
    return around


def slow_path_rules(sites: list[Site]) -> Pairs:
    """A rule for each encoder that contains one of `sites`."""
    encoders = {id(encoder): encoder for site in sites if site._encoders for encoder in site.encoders}
    return [(encoder, SlowPathRule()) for encoder in encoders.values()]
