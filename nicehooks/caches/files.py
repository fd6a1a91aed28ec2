"""Activations in files: any nesting of tensors and plain values, in the safetensors format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nicehooks.caches.watching import Calls
from nicehooks.errors import NiceHooksError, TreeMismatch
from nicehooks.values import trees

METADATA = "nicehooks"
"""The entry of the file's metadata that says, as JSON, how the tensors nest."""

RESERVED = "__metadata__"
"""The only name that safetensors gives to no tensor."""


def write(values: Mapping[str, Any], file: Any) -> None:
    """Writes `values` to `file`.

    Raises:
        TreeMismatch: a value has something else in it than tensors, numbers, strings and containers.
        NiceHooksError: safetensors is not installed.
    """
    save_file, _ = _safetensors()
    encoder = _Encoder()
    structure = {str(key): encoder.encode(value, str(key)) for key, value in values.items()}
    save_file(encoder.tensors, str(file), metadata={METADATA: json.dumps(structure)})


def read(file: Any) -> dict[str, Any]:
    """What `write` has written, or the tensors of any other safetensors file."""
    _, safe_open = _safetensors()
    with safe_open(str(file), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        structure = (opened.metadata() or {}).get(METADATA)
    if structure is None:
        return tensors
    return {key: _decode(code, tensors) for key, code in json.loads(structure).items()}


def _safetensors() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise NiceHooksError('saving and loading activations needs safetensors: pip install "nicehooks[hf]"') from None
    return save_file, safe_open


class _Encoder:
    """Turns values into JSON, and collects their tensors, each under the path of its place."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.storages: set[int] = set()

    def encode(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return {"tensor": self._add(value, path)}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        node = trees.open_node(value)
        if node is None or not all(_is_plain(entry) for entry in node.entries):
            kind = type(value).__name__
            raise TreeMismatch(f"{path!r} holds a {kind}, which cannot be saved; select or map the rest first.")
        pairs = zip(node.entries, node.children, strict=True)
        codes = [self.encode(child, path + trees.show_step(entry)) for entry, child in pairs]
        if isinstance(value, tuple | list):
            kind = "calls" if type(value) is Calls else "list" if isinstance(value, list) else "tuple"
            return {kind: codes}
        return {"dict": [[entry, code] for entry, code in zip(node.entries, codes, strict=True)]}

    def _add(self, tensor: Tensor, path: str) -> str:
        """Adds a tensor and says under which name; safetensors refuses two in the same memory."""
        name = path
        while name in self.tensors or name == RESERVED:
            name += "'"
        own = tensor.detach().resolve_conj().resolve_neg().contiguous()
        storage = own.untyped_storage().data_ptr()
        self.tensors[name] = own.clone() if storage in self.storages else own
        self.storages.add(storage)
        return name


def _is_plain(entry: Any) -> bool:
    """Whether JSON gives back the key `entry` as it was."""
    return entry is None or type(entry) in (bool, int, float, str)


def _decode(code: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = code.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {entry: _decode(child, tensors) for entry, child in content}
    build = {"list": list, "tuple": tuple, "calls": Calls}[kind]
    return build(_decode(child, tensors) for child in content)
