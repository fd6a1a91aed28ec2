"""What an anatomy says of a part, or of a module, that it does not have."""

from __future__ import annotations

from collections.abc import Mapping

from nicehooks.anatomies.layouts import Layout
from nicehooks.anatomies.tables import SEEN_BY, Lacks


def why_lacking(layout: Layout, what: str, attention: str, kind: str) -> str:
    """Why no layer has the part `what` under this attention implementation."""
    first = next((places for places in layout.layers if what in places.parts), layout.layers[0])
    place = first.parts.get(what)
    if what.removeprefix("cross_") in ("scores", "pattern") and attention not in SEEN_BY:
        known = " or ".join(map(repr, SEEN_BY))
        return FUSED_BRANCHES.format(kind=kind, what=what, now=attention, known=known)
    reason = place.get(attention) if isinstance(place, Mapping) else place
    return f"{kind} has no {what}: {reason.reason if isinstance(reason, Lacks) else 'none was found'}."


def why_no_module(layout: Layout, role: str, layer: int | None) -> str:
    """Why there is no module of this role."""
    if layout.is_found:
        return "a short forward showed none"
    wanted = getattr(layout.family, role, None)
    if isinstance(wanted, str) and layer is not None:
        return f"it was checked on a short forward, and {wanted!r} is not what makes the part"
    return wanted.reason if isinstance(wanted, Lacks) else "the table of its family names none"


NO_PART = "an anatomy has no {what!r}; its parts are {names}."

NO_UNEMBEDDING = (
    "{kind} has no unembedding{looked}, so that it gives no logits over tokens: take the model with a language "
    "modelling head around it."
)

NO_LANGUAGE = "{kind} has no language model there: what reads pictures ({tower}) reads no tokens."

FUSED_BRANCHES = (
    "{kind} has no {what} under attention implementation {now!r}: one kernel computes attention, and scores and "
    "pattern are never there.\n"
    '    model.set_attn_implementation("eager")  # {known} show it; then ask for the part again'
)
