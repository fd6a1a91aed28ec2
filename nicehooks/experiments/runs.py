"""One run of the model in an experiment: the call, and the metric of what it returns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.core.children import unwrap
from nicehooks.core.sessions import Session, is_acting
from nicehooks.core.tap import tap_of
from nicehooks.errors import NiceHooksError, SweepMismatch, TreeMismatch
from nicehooks.values import trees

PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Leaves of arguments and results that a run cannot change but by writing into a tensor."""


class Run:
    """A model, its inputs, and a metric of its output.

    Attributes:
        batch: how many examples there are: the first size of the first tensor among the inputs.
        sample: the output of the base run, whose largest numbers say how exact others can be.
    """

    def __init__(
        self, model: nn.Module, metric: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model = model
        self.metric = metric
        self.args = args
        self.kwargs = kwargs
        self.sample: Any = None
        self.inputs = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.batch = next((tensor.shape[0] for tensor in self.inputs if tensor.ndim), 0)
        self.has_state = not is_plain((args, kwargs))

    def refuse_no_examples(self, verb: str) -> None:
        """An error where the batch is empty."""
        if self.inputs and self.inputs[0].ndim and self.batch == 0:
            raise NiceHooksError(f"{verb}(model, …): there are no examples in the batch.")

    def output(self) -> Any:
        """What the model returns. What it could change in its arguments, as a key/value cache, is a copy each time."""
        args, kwargs = self.given()
        return self.model(*args, **kwargs)

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with in a run."""
        return copy.deepcopy((self.args, self.kwargs)) if self.has_state else (self.args, self.kwargs)

    def measured(self, output: Any) -> Tensor:
        """The metric of `output`: a scalar, or `[batch]`.

        Raises:
            TreeMismatch: it is something else.
        """
        return self._checked(self.metric(output), output)

    def differentiable(self, output: Any) -> Tensor:
        """The metric of `output`, of which gradients are taken: a scalar tensor, or `[batch]`.

        Raises:
            TreeMismatch: it is something else.
        """
        value = self.metric(output)
        checked = self._checked(value, output)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TreeMismatch(NO_SLOPE.format(shape=trees.structure_of(value)))
        return checked

    def _checked(self, given: Any, output: Any) -> Tensor:
        """What a metric returned, as floating-point numbers; one number in a tensor of one dimension is a scalar.

        It has one for each example where it has as many as the inputs have examples. Where nothing in the output has
        that many rows, the first dimension of the inputs may be no batch, and any number of them is taken.
        """
        value = _real_numbers(given)
        if value is None or value.ndim > 1:
            raise TreeMismatch(NO_NUMBER.format(shape=trees.structure_of(given)))
        value = value if value.is_floating_point() else value.float()
        counts = self._counts
        if not value.ndim or not counts or len(value) in counts:
            return value
        if len(value) == 1:
            return value[0]
        if any([leaf.shape[0] in counts for leaf in trees.leaves(output) if isinstance(leaf, Tensor) and leaf.ndim]):
            raise TreeMismatch(OTHER_COUNT.format(shape=trees.structure_of(given), count=self.batch))
        return value

    @functools.cached_property
    def _counts(self) -> set[int]:
        """How many examples the inputs may have: by the first dimension, or, of sequences first, by the second."""
        return {size for tensor in self.inputs for size in tensor.shape[: 2 if tensor.ndim > 2 else 1]}

    @functools.cached_property
    def scale(self) -> tuple[float, float]:
        """The largest number in `sample`, and the spacing of its floating-point numbers at 1: how exact others are."""
        tensors = [leaf for leaf in trees.leaves(self.sample) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        largest = max([1e-6, *[tensor.abs().max().item() for tensor in tensors if tensor.numel()]])
        return largest, max([0.0, *[torch.finfo(tensor.dtype).eps for tensor in tensors]])

    def lanes_in(self, budget: int) -> int:
        """How many batches side by side take about `budget` bytes, if three tensors as large as the output live."""
        if self.inputs and self.inputs[0].is_cuda:
            budget = torch.cuda.mem_get_info(self.inputs[0].device)[0] // 2
        tensors = [leaf for leaf in trees.leaves(self.sample) if isinstance(leaf, Tensor)]
        return max(1, budget // max(1, 3 * sum(map(trees.bytes_of, tensors))))


@contextmanager
def repeatable(model: nn.Module, verb: str, check: bool = True) -> Iterator[None]:
    """Refuses a run that draws random numbers: no two would be equal.

    Raises:
        SweepMismatch: it did.
    """
    before = _random_states(model) if check else []
    yield
    if check and any([not torch.equal(old, new) for old, new in zip(before, _random_states(model), strict=True)]):
        raise SweepMismatch(RANDOM.format(verb=verb))


def _random_states(model: nn.Module) -> list[Tensor]:
    """Those of the generators that a run may draw from."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return [torch.get_rng_state(), *[torch.cuda.get_rng_state(device) for device in sorted(devices, key=str)]]


RANDOM = (
    "{verb}: the model, or a function that was given, draws random numbers, so no two runs are equal, and an effect "
    "would be noise as well. Is the model in training mode, with dropout?\n"
    "    model.eval()\n"
    "  check=False runs it all the same."
)


def refuse_steps(model: nn.Module, verb: str) -> None:
    """Refuses interventions that act here and count steps: the runs of an experiment are one step, and not several.

    Raises:
        SweepMismatch: there is one; the message names it.
    """
    for session in sessions_acting_on(model):
        if session.no_step is not None:
            raise SweepMismatch(STEPS_AROUND.format(verb=verb, label=session.label))


def sessions_acting_on(model: nn.Module) -> list[Session]:
    """The sessions of the interventions that act here on a module of `model`, once for each of their rules."""
    taps = [tap for module in unwrap(model).modules() if (tap := tap_of(module)) is not None]
    return [rule.session for tap in taps for rule in tap.rules if is_acting(rule.session)]


STEPS_AROUND = (
    "{verb} runs the model many times, and {label} acts at some steps alone, so that its runs would not be equal.\n"
    "  Enter it without steps=, or {verb} outside of it."
)


def _real_numbers(value: Any) -> Tensor | None:
    """What a metric returned as a tensor of real numbers; None where it is no such thing."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        numbers = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if numbers.is_complex() else numbers


def is_plain(tree: Any) -> bool:
    """Whether `tree` is made of containers, tensors and constants alone."""
    return all([isinstance(leaf, PLAIN) for leaf in trees.leaves(tree)])


NO_NUMBER = (
    "metric(output) is one number for each example, or one for all, but it returned {shape}.\n"
    "    metric=lambda output: output.logits[:, -1, answer]"
)

OTHER_COUNT = (
    "metric(output) is one number for each example, or one for all, but it returned {shape} for a batch of "
    "{count}.\n"
    "    metric=lambda output: output.logits[:, -1, answer]"
)

NO_SLOPE = (
    "metric(output) returned {shape}. It is a number, but what is missing is a floating tensor with a gradient: leave "
    ".item() and float(…) out.\n"
    "    metric=lambda output: output.logits[:, -1, answer]"
)
