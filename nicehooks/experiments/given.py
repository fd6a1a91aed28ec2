"""What experiments are given, looked at before the model runs: the model, the metric, counts and numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import nn


def check_model_and_metric(model: Any, metric: Any, verb: str) -> None:
    """Refuses what is no model, and what is no function of its output.

    Raises:
        TypeError: it is one of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}(model, …) takes a torch.nn.Module as model, not {type(model).__name__}")
    if not callable(metric):
        raise TypeError(NO_FUNCTION.format(verb=verb, kind=type(metric).__name__))


NO_FUNCTION = (
    "{verb}(…, metric, *args) takes a function of what the model returns as metric, not {kind}:\n"
    "    metric=lambda output: output.logits[:, -1, answer]"
)


def count_given(value: Any, what: str, least: int = 0) -> int:
    """`value`, if it is a whole number from `least` on; `what` is the call as it is written, up to the argument.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}={value!r}): it is a whole number, not {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{what}={value!r}): it is a whole number, not bool")
    if count < least:
        raise ValueError(f"{what}={value!r}): it is {least} or more")
    return count


def number_given(value: Any, what: str) -> float:
    """`value`, if it is a number; `what` is the call as it is written, up to the argument.

    Raises:
        TypeError: it is no number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or isinstance(value, str):
        raise TypeError(f"{what}={value!r}): it is a number, not {type(value).__name__}")
    return number


def threshold_given(value: Any, what: str) -> float:
    """`value`, if it is a number that others can be compared with; `what` is the call, up to the argument.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN.
    """
    number = number_given(value, what)
    if math.isnan(number):
        raise ValueError(f"{what}={value!r}): nothing is larger than NaN, or smaller")
    return number
