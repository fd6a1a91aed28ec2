"""How the backward of compiled code comes back to the context that was around its forward.

NOTE [Gradients of compiled code]
What acts on a gradient acts when backward runs, and by then the forward was compiled, perhaps for another entry of the
context. So compiled code has an operator in it that Dynamo does not look into. It is given a token, which is a tensor:
Dynamo guards no values of tensors, so the next entry compiles nothing, and brings a token of its own. Whoever has left
has no token any more. Compilers drop operators whose result nobody asks for; this one has a second result, which is
the gradient of the token.
"""

from __future__ import annotations

import itertools
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nicehooks import torch_private, torch_private_tensors
from nicehooks.core.sessions import Session

_token_numbers = itertools.count(1)
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
"""The sessions that have a token; a forgotten handle ends with its model."""


def give_token(session: Session, rules: dict[int, Any]) -> None:
    """From here on compiled code can come back to `rules`."""
    number = next(_token_numbers)
    session.ticket = torch.tensor(float(number), dtype=torch.float64, device="cpu", requires_grad=True)
    session.rules = rules
    _sessions[number] = session


def take_token(session: Session) -> None:
    """Undoes `give_token`."""
    if session.ticket is not None:
        _sessions.pop(int(session.ticket.item()), None)
        session.ticket = None
        session.rules = {}


def passed(gradient: Tensor, token: Tensor, rule: int, key: str, steps: int, order: int) -> tuple[Tensor, Tensor]:
    """The gradient after a rule has acted on it, and what the token gets for its own; in traced code alone.

    Args:
        gradient: of a tensor at the site.
        token: that of the rule's session.
        rule: which of the session's rules.
        key: the path of the tensor.
        steps: how many steps of the rule's path lead on in the tensor.
        order: when the tensor was made.
    """
    define_operator()
    return torch.ops.nicehooks.gradient(gradient, token, rule, key, steps, order, 0)


def _pass(
    gradient: Tensor, token: Tensor, rule: int, key: str, steps: int, order: int, mapped: int
) -> tuple[Tensor, Tensor]:
    session = _sessions.get(int(token.item()))
    # Compiled code writes to its buffers again: to what it has handed in, and to what it gets back.
    changed = gradient if session is None else session.rules[rule](gradient.clone(), key, steps, order, mapped)
    return torch.empty_like(gradient).copy_(changed), torch.zeros_like(token)


def _pass_mapped(info: Any, dims: Any, gradient: Tensor, *rest: Any) -> Any:
    """Under `vmap`: all examples at once, with the mapped dimension in front."""
    mapped = rest[-1]
    front = gradient.expand(info.batch_size, *gradient.shape) if dims[0] is None else gradient.movedim(dims[0], 0)
    return torch.ops.nicehooks.gradient(front, *rest[:-1], mapped + 1), (0, None)


def _pass_each(gradient: Tensor, token: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Where torch runs one backward for a batch of gradients; see `each_of_batch`."""

    def act(gradients: list[Tensor]) -> list[Tensor]:
        return [torch.ops.nicehooks.gradient(gradients[0], token, *rest)[0]]

    (changed,) = torch_private_tensors.each_of_batch(act, [gradient])
    return changed, torch.zeros_like(token)


_kernels = torch.library.Library("nicehooks", "FRAGMENT")


@torch_private.evaluated_while_tracing
def define_operator() -> bool:
    """Makes the operator, if it is not there yet."""
    return _define_operator()


@cache
def _define_operator() -> bool:
    operator = torch.library.custom_op("nicehooks::gradient", _pass, mutates_args=())
    operator.register_fake(lambda gradient, token, *_: (torch.empty_like(gradient), torch.empty_like(token)))
    operator.register_vmap(_pass_mapped)
    _kernels.impl("gradient", _pass_each, "Batched")
    return True
