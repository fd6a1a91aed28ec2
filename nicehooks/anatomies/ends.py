"""What is before the first layer and behind the last one, found in a recorded forward: embedding, norm, unembedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.layouts import Head
from nicehooks.anatomies.mlp_parts import is_projection
from nicehooks.anatomies.noted_values import Key, Value, key_of
from nicehooks.anatomies.offloaded import parameter_there
from nicehooks.anatomies.recording import NotedCall, Record
from nicehooks.anatomies.stacks import Stack
from nicehooks.anatomies.streams import is_norm
from nicehooks.anatomies.tables import NO_LAST_NORM, Lacks
from nicehooks.paths.names import escape

POSITION_NAMES = ("wpe", "position", "pos_emb")


class Ends:
    """The single parts of a model around one stack.

    Attributes:
        parts: by part, its path, or why there is none.
        roles: by role, the name of a module.
        head: how the logits come from the last stream.
    """

    def __init__(self, record: Record, stack: Stack, output: Any, run: str, post_norm: bool) -> None:
        self.record = record
        self.stack = stack
        self.parts: dict[str, str | Lacks] = {}
        self.roles: dict[str, str] = {}
        self.head = Head()
        self.vocabulary: int | None = None
        self.caps = _caps_in(record.names)
        first, last = stack.layers[0].call, stack.layers[-1].call
        self.before = [call for call in record.of_modules() if call.end != -1 and call.end < first.begin]
        self.after = [call for call in record.of_modules() if call.begin > last.end]
        self._embedding()
        stream = self._final_norm(post_norm)
        self._logits(stream, *self._whole(output, run))

    def _embedding(self) -> None:
        ids = next((call for call in self.before if _has_ids(call)), None)
        if ids is None:
            self.parts["embed"] = Lacks("no embedding of tokens was seen to run before its first layer")
            return
        self.parts["embed"] = self.record.path(ids, ids.outputs[0])
        self.roles["token_embedding"] = ids.owner
        self.vocabulary = len(_weight_of(ids))
        positions = [call for call in self.before if _is_table(call) and _is_about_positions(call)]
        if positions:
            self.roles["position_embedding"] = positions[0].owner

    def _final_norm(self, post_norm: bool) -> Key:
        stream = self.stack.layers[-1].gives.key
        norm = next((call for call in self.after if is_norm(call) and call.inputs[0].key == stream), None)
        if norm is None:
            self.parts["final_norm"] = NO_LAST_NORM if post_norm else Lacks("no norm reads what its last layer gives")
            return stream
        self.parts["final_norm"] = self.record.path(norm, norm.outputs[0])
        self.roles["final_norm"] = norm.owner
        return norm.outputs[0].key

    def _whole(self, output: Any, run: str) -> tuple[Tensor | None, str]:
        """The logits that the model gives, and their path: of an output that names them, or the output itself."""
        for call in self.record.of_modules():
            for value in call.outputs:
                if value.step in ("['logits']", "['prediction_logits']"):
                    return value.tensor, self.record.path(call, value)
        is_plain = isinstance(output, Tensor) and output.ndim > 1 and output.is_floating_point()
        return (output, escape(run)) if is_plain else (None, "")

    def _logits(self, stream: Key, logits: Tensor | None, whole: str) -> None:
        if logits is None:
            return
        is_over_tokens = self.vocabulary in (None, logits.shape[-1])
        head = self._unembedding(logits, stream) if is_over_tokens else None
        if head is None:
            self.parts["logits"] = whole
            if is_over_tokens and self._is_tied(logits, stream):
                self.roles["unembed"] = self.roles["token_embedding"]
            return
        self.parts["logits"] = self.record.path(head, head.outputs[0]) if self.head == Head() else whole
        self.roles["unembed"] = head.owner

    def _unembedding(self, logits: Tensor, stream: Key) -> NotedCall | None:
        """The innermost module that reads the last stream (or a projection of it) and gives the logits."""
        found = self._giving(logits, stream) or self._giving_scaled(logits, stream)
        if found is None:
            for call in self.after:
                if found is None and is_projection(call) and _reads(call, stream):
                    found = self._giving(logits, call.outputs[0].key)
                    if found is not None:
                        self.roles["before_unembed"] = call.owner
        return found

    def _is_tied(self, logits: Tensor, stream: Key) -> bool:
        """Whether the table of the embedding gives the logits, by a function: no module unembeds."""
        table = self.record.names.get(self.roles.get("token_embedding", ""))
        last = next((one for one in self._values_after() if one.key == stream), None)
        if not isinstance(table, nn.Embedding) or last is None or table.weight.is_meta:
            return False
        if last.shape[-1] != table.embedding_dim or last.tensor.dtype != table.weight.dtype:
            return False
        head = _head_between(unembedded_by(table, last.tensor), logits, self.caps)
        self.head = head or self.head
        return head is not None

    def _values_after(self) -> Iterator[Value]:
        last = self.stack.layers[-1]
        yield last.gives
        yield from (value for call in self.after for value in call.outputs)

    def _giving(self, logits: Tensor, reads: Key) -> NotedCall | None:
        for call in reversed(self.after):
            head = (
                _head_between(call.outputs[0].tensor, logits, self.caps)
                if call.outputs and _reads(call, reads)
                else None
            )
            if head is not None:
                self.head = head
                return call
        return None

    def _giving_scaled(self, logits: Tensor, stream: Key) -> NotedCall | None:
        """As `_giving`, where the last stream is multiplied with a number before it is unembedded."""
        known = next((value for call in self.after for value in call.outputs if value.key == stream), None)
        for call in reversed(self.after):
            if known is not None and is_projection(call) and getattr(call.module, "bias", None) is None:
                factor = _head_between(known.tensor, call.inputs[0].tensor)
                head = None if factor is None else _head_between(call.outputs[0].tensor, logits, self.caps)
                if head is not None and factor is not None and factor.softcap is None:
                    self.head = head._replace(scale=head.scale * factor.scale)
                    return call
        return None


def unembedded_by(module: nn.Module, normed: Tensor) -> Tensor:
    """What an unembedding gives: a module, or the table of the embedding, used backwards."""
    if not isinstance(module, nn.Embedding):
        return module(normed)
    weight = parameter_there(module, "weight")
    assert weight is not None
    return nn.functional.linear(normed, weight)


def _reads(call: NotedCall, key: Key) -> bool:
    return bool(call.inputs) and call.inputs[0].key == key


def _has_ids(call: NotedCall) -> bool:
    return _is_table(call) and not _is_about_positions(call) and "token_type" not in call.owner


def _is_about_positions(call: NotedCall) -> bool:
    return any(name in call.owner.lower() for name in POSITION_NAMES)


def _is_table(call: NotedCall) -> bool:
    """Whether the module looks whole numbers up in a table."""
    reads = bool(call.inputs) and bool(call.outputs) and not call.inputs[0].tensor.is_floating_point()
    return reads and _weight_of(call).ndim == 2 and call.outputs[0].shape[-1] == _weight_of(call).shape[-1]


def _weight_of(call: NotedCall) -> Tensor:
    weight = getattr(call.module, "weight", None)
    return weight if isinstance(weight, Tensor) else torch.zeros(())


def _head_between(given: Tensor, logits: Tensor, caps: tuple[float, ...] = ()) -> Head | None:
    """What is done to what the unembedding gives to make the logits of it: nothing, a factor, a soft cap.

    Args:
        given: what the unembedding gives.
        logits: the logits.
        caps: what a soft cap may be; others are looked for.
    """
    if given.shape != logits.shape or not given.is_floating_point():
        return None
    if key_of(given) == key_of(logits):
        return Head()
    rounding = max(1e-4, 4 * torch.finfo(given.dtype).eps)
    given, logits = given.double(), logits.double()
    for cap in caps:  # of small logits, one cap is like another, and like none
        if _is_same_end(cap * torch.tanh(given / cap), logits, rounding):
            return Head(softcap=cap)
    scale = float((given * logits).sum() / (given * given).sum().clamp_min(1e-30))
    if _is_same_end(given * scale, logits, rounding):
        return Head(scale=scale)
    cap = _cap_between(given, logits)
    return Head(softcap=cap) if _is_same_end(cap * torch.tanh(given / cap), logits, rounding) else None


def _cap_between(given: Tensor, logits: Tensor) -> float:
    """The cap `c` of `c tanh(x / c)`, by bisection: the more it caps, the smaller it is."""
    index = int(given.abs().argmax())
    x, y = given.flatten()[index].abs(), logits.flatten()[index].abs()
    low, high = float(y), 1e6
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if float(middle * torch.tanh(x / middle)) > float(y) else (middle, high)
    return low


def _is_same_end(a: Tensor, b: Tensor, rounding: float) -> bool:
    return torch.allclose(a, b, rtol=rounding, atol=0.1 * rounding * float(b.abs().max()))


def _caps_in(names: Mapping[str, nn.Module]) -> tuple[float, ...]:
    """The soft caps of logits that a config in a model speaks of; those of attention are others."""
    configs = {id(one): one for module in names.values() if (one := vars(module).get("config")) is not None}
    said = (pair for config in configs.values() for pair in getattr(config, "__dict__", {}).items())
    caps = ((name.replace("_", ""), cap) for name, cap in said if isinstance(cap, int | float) and cap > 0)
    return tuple(dict.fromkeys(float(cap) for name, cap in caps if "softcap" in name and "att" not in name))
