"""Activations in files: any nesting of tensors and plain values, in the safetensors format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nicehooks.caches.watching import Calls
from nicehooks.errors import FileFault, FileMissing, NiceHooksError, TreeMismatch
from nicehooks.values import trees

METADATA = "nicehooks"
"""The entry of the file's metadata that says, as JSON, how the tensors nest."""

RESERVED = "__metadata__"
"""The only name that safetensors gives to no tensor."""


def write(values: Mapping[str, Any], file: Any) -> None:
    """Writes `values` to `file`.

    Raises:
        TreeMismatch: a value has something else in it than tensors, numbers, strings and containers.
        FileFault: the file cannot be written.
        NiceHooksError: safetensors is not installed.
    """
    save_file, _ = _safetensors()
    encoder = _Encoder()
    structure = {str(key): encoder.encode(value, str(key)) for key, value in values.items()}
    folder = Path(str(file)).parent
    if not folder.is_dir():
        raise FileMissing(f"{str(file)!r} cannot be written: there is no folder {str(folder)!r}.")
    try:
        save_file(encoder.tensors, str(file), metadata={METADATA: json.dumps(structure)})
    except (*BROKEN, *_own_errors()) as error:
        raise FileFault(f"{str(file)!r} cannot be written: {error}") from None


def read(file: Any) -> dict[str, Any]:
    """What `write` has written, or the tensors of any other safetensors file.

    Raises:
        FileFault: the file cannot be read, or does not hold what it says.
        NiceHooksError: safetensors is not installed.
    """
    name = str(file)
    tensors, metadata = _opened(name)
    if METADATA not in metadata:
        return dict(tensors)
    try:
        structure = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise FileFault(f"{name!r} is damaged: its entry {METADATA!r} is no JSON ({type(error).__name__}).") from None
    if not isinstance(structure, dict):
        raise FileFault(f"{name!r} is damaged: its entry {METADATA!r} is no mapping of paths to values.")
    return {key: _Decoder(name, key, tensors).decode(code) for key, code in structure.items()}


def _opened(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    _, safe_open = _safetensors()
    if not Path(name).exists():
        raise FileMissing(f"{name!r} cannot be read: there is no such file.")
    try:
        with safe_open(name, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            return tensors, opened.metadata() or {}
    except (*BROKEN, *_own_errors()) as error:
        raise FileFault(f"{name!r} cannot be read: it is damaged, or is no safetensors file ({error}).") from None


def _safetensors() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise NiceHooksError('saving and loading activations needs safetensors: pip install "nicehooks[hf]"') from None
    return save_file, safe_open


BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What may be raised for a file that is not as it should be, beside what safetensors raises itself."""


def _own_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (SafetensorError,)


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
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            shown = trees.structure_of(tensor)
            raise TreeMismatch(f"{path!r} holds a {shown}, which cannot be saved; select or map the rest first.")
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


class _Decoder:
    """Builds the value at one path of a file from what the file says of it."""

    def __init__(self, file: str, path: str, tensors: dict[str, Tensor]) -> None:
        self.file = file
        self.path = path
        self.tensors = tensors

    def decode(self, code: Any) -> Any:
        """The value that `code` stands for.

        Raises:
            FileFault: `code` is nothing that `write` writes, or names a tensor that is not in the file.
        """
        try:
            return self._decode(code)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"its tensor {error} is missing" if isinstance(error, _NoTensor) else "no value is written like this"
            raise FileFault(f"{self.file!r} is damaged at {self.path!r}: {what}.") from None

    def _decode(self, code: Any) -> Any:
        ((kind, content),) = code.items()
        if kind == "tensor":
            if content not in self.tensors:
                raise _NoTensor(content)
            return self.tensors[content]
        if kind == "value":
            return _checked(content, _is_plain(content))
        if kind == "dict":
            return {entry: self._decode(child) for entry, child in content}
        build = {"list": list, "tuple": tuple, "calls": Calls}[kind]
        return build(self._decode(child) for child in _checked(content, isinstance(content, list)))


class _NoTensor(KeyError):
    """A tensor that a file names is not in it."""


def _checked(content: Any, right: bool) -> Any:
    if not right:
        raise ValueError
    return content
