"""What a context says when it did nothing: the model was not called, or a site was not reached."""

from __future__ import annotations

from typing import Any

from torch import nn

from nicehooks.core.children import unwrap
from nicehooks.core.rules import SiteRule
from nicehooks.core.selection import Site
from nicehooks.core.sessions import Session


def not_called(context: Any, session: Session) -> str:
    """That the model was not called in `context` at all."""
    text = f"{context!r} was left, but the model was not called in it."
    if session.elsewhere:
        text += f" It was called in another thread or task meanwhile, {NOT_THERE}"
    if session.suspended:
        text += " It was called inside suspend(model) only."
    return text


def not_reached(context: Any, session: Session, rule: SiteRule) -> str:
    """That the site of `rule` was not reached, and why."""
    text = f"{rule.key!r} was never reached in {type(unwrap(context.model)).__name__}: {_reason(rule, session)}"
    return f"{text}\n  while {context!r} was active"


def forgotten(context: Any) -> str:
    """That an entered context is over, as nothing refers to it any more."""
    return FORGOTTEN.format(context=repr(context))


FORGOTTEN = (
    "{context} was entered, and is over, as nothing refers to it any more. Enter it with `with`, keep what you call "
    "__enter__ on, or .attach() it."
)

NOT_THERE = (
    "where this context does not act: enter it there, carry it along with contextvars.copy_context(), or use .attach()."
)


def _reason(rule: SiteRule, session: Session) -> str:
    site = rule.site
    parent = _parent(site)
    if isinstance(parent, nn.MultiheadAttention):
        name = site.name.rpartition(".")[0]
        return (
            "nn.MultiheadAttention hands the weights of its out_proj to a fused function and never calls it. "
            f"What comes out of it is the output of the attention: {name + '[0]'!r}."
        )
    if session.elsewhere:
        return f"its module ran in another thread or task, {NOT_THERE}"
    if session.stopped:
        return (
            "a capture with stop=True ended the forward before it. Enter this context first, or let the model run on."
        )
    if rule.reason:
        return rule.why_not_reached()
    if rule.chain and session.called:
        return (
            "either nothing called this module, or the part of its value that the path selects was empty every time "
            "(as [:, 50:60] is of 8 positions)."
        )
    if rule.when.counts and session.called:
        return f"the model ran, but not once with {rule.when.shown}."
    if session.suspended:
        return "it was called inside suspend(model) only."
    return (
        "nothing called this module. Its parent may use the weights without calling it, may call it only in another "
        "mode or for other inputs, or may hold another module under this name by now; or somebody has given this one "
        "another forward since the context was entered."
    )


def _parent(site: Site) -> nn.Module | None:
    model: Any = site._model()  # pyright: ignore[reportPrivateUsage]
    name = site.name.rpartition(".")[0]
    try:
        return model.get_submodule(name) if site.name else None
    except AttributeError:
        return None
