"""The step `/rows`: the dimensions that the module around a site has flattened, noted when it is called."""

from __future__ import annotations

from torch import Tensor, nn

from nicehooks.core.calling import has_forward
from nicehooks.core.census import module_at
from nicehooks.core.frames import Frame, Rule
from nicehooks.core.register import Pairs, add_around
from nicehooks.core.selection import Site
from nicehooks.errors import UnsupportedModule
from nicehooks.values.regions import Rows


class RowsRule(Rule):
    """Notes the dimensions that the module around a site may flatten; see `Rows`."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        given = [value for value in (*frame.args, *frame.kwargs.values()) if isinstance(value, Tensor)]
        self.session.progress().rows = tuple(given[0].shape[:-1]) if given else None


def _rows_rules(sites: list[Site], root: nn.Module, counting: bool) -> Pairs:
    """A rule for each module around a site that splits rows."""
    split = [site for site in sites if any([isinstance(step, Rows) for step in site.path.chain])]
    around = {id(module): module for module in [_module_around(site, root) for site in split]}
    return [(module, RowsRule()) for module in around.values()]


def _module_around(site: Site, root: nn.Module) -> nn.Module:
    """The module around that of `site`."""
    outer, dot, _ = site.name.rpartition(".")
    around = module_at(root, outer)
    if not site.name or around is None or (dot and not has_forward(around)):
        raise UnsupportedModule(f"{str(site)!r}: /rows needs a module around {site.name!r} that is called.")
    return around


add_around(_rows_rules)
