"""Numbers that were given as arguments: whole ones, and large enough."""

from __future__ import annotations

import operator
from typing import Any

from nicehooks.errors import NiceHooksError


class BadArgument(NiceHooksError, ValueError):
    """An argument makes no sense, whatever the model and the data are: a size below one, a part that there is not."""


def whole_numbers(values: Any, what: str) -> tuple[int, ...]:
    """Some numbers that were given as `what`.

    Raises:
        BadArgument: they are no whole numbers.
    """
    try:
        return tuple([operator.index(value) for value in values])
    except TypeError:
        raise BadArgument(f"{what}={values!r}: it is a list of whole numbers") from None


def whole_number(value: Any, what: str, least: int) -> int:
    """A number that was given as `what`.

    Raises:
        BadArgument: it is no whole number, or is too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise BadArgument(f"{what}={value!r}: it is a whole number, {least} or more")
    return operator.index(value)
