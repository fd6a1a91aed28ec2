"""A value that is not what an intervention can take, or not of the shape of what it replaces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nicehooks.core.rules import SiteRule
from nicehooks.errors import TreeMismatch
from nicehooks.values import trees


def at_site(rule: SiteRule, error: TreeMismatch, value: Any, key: str) -> TreeMismatch:
    """The bare fact that `error` has, with the site and the line to write instead."""
    verb = rule.action.verb
    text = f"{verb} at {key!r}: {error}."
    node = trees.open_node(value)
    pairs = [] if node is None else list(zip(node.entries, node.children, strict=True))
    tensors = [entry for entry, child in pairs if isinstance(child, Tensor)]
    if not rule.chain and tensors:
        text += f"\n  the value there is {trees.structure_of(value)}; choose a part of it:"
        text += f'\n    {rule.action.for_part or verb}(model, "{key}{trees.show_step(tensors[0])}", …)'
    return TreeMismatch(text)
