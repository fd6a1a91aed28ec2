"""What is said where a path selects nothing: the nearest names, and the line to write instead if there is just one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from nicehooks import torch_private
from nicehooks.core.calling import has_forward
from nicehooks.core.census import Census
from nicehooks.core.children import unwrap
from nicehooks.core.register import kind_of
from nicehooks.errors import PathError, SiteNotFound, UnsupportedModule
from nicehooks.paths.grammar import ModulePath

TAKES_MORE = ("patch", "edit", "steer")
"""The verbs that need more than a model and a path."""

RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits")
ATTENTION = ("attn_in", "q", "k", "v", "scores", "pattern", "z", "attn_out")
MLP = ("mlp_in", "mlp_pre", "mlp_post", "mlp_out")
ANATOMY_PARTS = frozenset((*RESIDUAL, *ATTENTION, *MLP))
"""What the field calls the parts of a transformer; `anatomy(model)` finds them."""

HOOK_POINTS = {"attn_scores": "scores", "pre": "mlp_pre", "post": "mlp_post"}
"""Parts that have another name as hook points of TransformerLens, `blocks.5.mlp.hook_post`."""

LAYERS = frozenset(("h", "block", "blocks", "layer", "layers", "resblocks"))
"""What the list of layers is called, in one family or another."""

LONGEST = 200
"""Characters of a name that somebody may have meant to write."""


def nothing_matches(model: nn.Module, path: ModulePath, named: list[tuple[str, nn.Module]], verb: str) -> Exception:
    """The error that says that `path` selects nothing, though it matches the names in `named`, and what does."""
    census = Census(model)
    inside = [(name, module) for name, module in census.names.items() if _leads_into(path, name, module)]
    return scripted(*inside[0]) if inside else SiteNotFound(_why(census, path, named, verb))


def scripted(name: str, module: nn.Module) -> Exception:
    """The error that says that `module`, whose name is `name`, is TorchScript."""
    return UnsupportedModule(SCRIPTED.format(name=name, kind=type(module).__name__))


SCRIPTED = (
    "{name!r} is a {kind}: TorchScript runs its forward outside of Python, where nothing can be captured or changed.\n"
    "  Use the original nn.Module instead of the scripted one, or select only modules around it."
)


def _leads_into(path: ModulePath, name: str, module: nn.Module) -> bool:
    """Whether `path` leads into a TorchScript module."""
    return torch_private.is_scripted(module) and path.plain_name.startswith(f"{name}." if name else "")


def _why(census: Census, path: ModulePath, named: list[tuple[str, nn.Module]], verb: str) -> str:
    if named:
        name, module = named[0]
        missing = kind_of(path.port).missing(name, module, path.port)
        if missing is not None:
            return missing
        kind = type(module).__name__
        instead = replace(path, name=f"{name}.*" if name else "*")
        return f"{name!r} is a {kind}, which is never called itself.\n  its children: {str(instead)!r}"
    lines = _part_of_anatomy(path, verb) or _port_as_name(census, path, verb) or list(_nearest(census, path, verb))
    return "\n".join([f"no module matches {str(path)!r} in {type(census.root).__name__}.", *lines])


def nothing_chosen(model: nn.Module, item: Any) -> SiteNotFound:
    """The error that says that no module is as `item` wants it."""
    shown = f"this {type(item).__name__}" if isinstance(item, nn.Module) else getattr(item, "__name__", str(item))
    return SiteNotFound(f"{shown} selects no module that is ever called in {type(unwrap(model)).__name__}.")


def chooses_nothing(item: Any) -> PathError:
    """The error that says that `item` is nothing that selects sites."""
    return PathError(
        f"{item!r} selects no sites: write a path, a Site, True, a regular expression, a predicate "
        "(name, module) -> bool, a module type, a module, or a list of them"
    )


def _lines(wrong: str, right: str) -> list[str]:
    width = max(len(wrong), len(right))
    return [f"    {wrong:<{width}}  # incorrect", f"    {right:<{width}}  # correct"]


# --- parts of a transformer -------------------------------------------------------------------------------------------


def _part_of_anatomy(path: ModulePath, verb: str) -> list[str]:
    """The lines of a message for a path that is no name in the model, but what the field calls a part of it."""
    part, layer = path.name, ""
    hook = re.fullmatch(r"(?:blocks\.(\d+|\*)\.)?(?:\w+\.)?hook_(\w+)", path.name)
    if hook is not None:
        part = HOOK_POINTS.get(hook[2], hook[2])
        layer = f"[{hook[1]}]" if hook[1] and hook[1] != "*" else ""
    if part not in ANATOMY_PARTS:
        return [] if hook is None else [HOOK_POINT.format(name=path.name)]
    more = ", …" if verb in TAKES_MORE else ""
    right = f"anatomy(model).{part}{layer or path.subscripts}"
    return [
        f"  {part} is a part of a transformer, which anatomy(model) finds:",
        *_lines(f'{verb}(model, "{path}"{more})', f"{verb}(model, {right}{more})"),
    ]


HOOK_POINT = (
    "  it is the name of a hook point, as hooked(model) of nicehooks.hookpoints has them:\n"
    '    hooked(model).run_with_cache(…)[1]["{name}"]'
)


# --- ports that were written as names ---------------------------------------------------------------------------------

AS_ATTRIBUTES = {"output": "", "input": "@input[0]", "inputs": "@input", "grad": "@grad"}
"""How values of a module are called where they are attributes of it, and what they are here."""


def _port_as_name(census: Census, path: ModulePath, verb: str) -> list[str]:
    """The lines of a message for `layer.weight`, a parameter by the name that it has in a state_dict, and its kin."""
    owner, _, last = path.plain_name.rpartition(".")
    module = census.names.get(owner)
    if module is None or not path.port.is_output or path.is_wild or path.call is not None:
        return []
    own = last in module._parameters or last in module._buffers
    spelled = f"\\{last}" if last in AS_ATTRIBUTES else last  # with a backslash it is no other port
    port = f"@{spelled}" if own else AS_ATTRIBUTES.get(last) if owner and has_forward(module) else None
    if port is None or (own and not last.isidentifier()):
        return []
    more = ", …" if verb in TAKES_MORE else ""
    right = f"{path.name.rpartition('.')[0]}{port}{path.subscripts}"
    what, whose = "a parameter or buffer" if own else "a value", repr(owner) if owner else "the model"
    lines = _lines(f'{verb}(model, "{path}"{more})', f'{verb}(model, "{right}"{more})')
    return [f"  {last} is {what} of {whose}, and no module in it:", *lines]


# --- the nearest names ------------------------------------------------------------------------------------------------


def _nearest(census: Census, path: ModulePath, verb: str) -> Iterator[str]:
    """The lines of a message that say which names were probably meant, and what to write."""
    wanted = _pattern_of(path.name)
    kinds: dict[str, list[str]] = {}
    for name, module in census.names.items():
        if name and has_forward(module):
            kinds.setdefault(_pattern_of(name), []).append(name)
    best = max(kinds, key=lambda kind: _closeness(wanted, kind), default=None) if len(wanted) <= LONGEST else None
    if best is None or not _is_alike(wanted, best):
        return
    names = kinds[best]
    shown = f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)
    yield f"  nearest names: {shown}"
    right = _meant(path, wanted, best, names)
    if right is not None:
        more = ", …" if verb in TAKES_MORE else ""
        yield from _lines(*[f'{verb}(model, "{text}"{more})' for text in (path, replace(path, name=right))])


def _pattern_of(name: str) -> str:
    """`name` with `*` for every number, wildcard and alternative: what all layers have in common."""
    return re.sub(r"(^|(?<=\.))(\d+|\*+|\{[^}]*\})(?=\.|$)", "*", re.sub(r"\\(.)", r"\1", name))


def _closeness(wanted: str, kind: str) -> tuple[float, float]:
    last_alike = (wanted.split(".")[-1] == "*") == (kind.split(".")[-1] == "*")
    ratio = _ratio(wanted, kind)
    tail = _ratio(wanted.split(".")[-1], kind.split(".")[-1])
    depth = abs(wanted.count(".") - kind.count("."))
    return (2.0 * _ends_alike(wanted, kind) + 0.5 * last_alike, ratio + tail - 0.2 * depth)


def _ratio(wanted: str, kind: str) -> float:
    return difflib.SequenceMatcher(None, wanted, kind).ratio()


def _ends_alike(wanted: str, kind: str) -> bool:
    return kind == wanted or kind.endswith("." + wanted)


def _is_alike(wanted: str, kind: str) -> bool:
    """Whether the names of this kind are worth showing to who wrote `wanted`: much the same, or beside it."""
    parent, dot, last = wanted.lower().rpartition(".")
    beside, _, other = kind.lower().rpartition(".")
    if dot and parent == beside:
        return True
    if "*" in (last, other):
        return _ends_alike(wanted, kind) or _is_typo(wanted, kind) or _ratio(wanted, kind) >= 0.5
    return _ratio(last, other) >= 0.5 or last in other or other in last


def _meant(path: ModulePath, wanted: str, kind: str, names: list[str]) -> str | None:
    """The name that was meant, where there can be no doubt: a prefix left out, a slip, another word for the layers."""
    if path.plain_name in names or not (_ends_alike(wanted, kind) or _is_typo(wanted, kind)):
        return None
    if path.is_wild:
        return kind
    numbers = _numbers(path.name)
    fitting = [name for name in names if _numbers(name)[-len(numbers) or len(name) :] == numbers]
    return fitting[0] if len(fitting) == 1 else None


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"(?:^|(?<=\.))\d+(?=\.|$)", name)]


def _is_typo(wanted: str, kind: str) -> bool:
    """Whether `kind` ends as `wanted` does, but for a slip in each segment, or another word for the layers.

    One of the two may have a longer way there; if that is `wanted`, more than the last segment has to be the same.
    """
    segments, others = wanted.split("."), kind.split(".")
    common = min(len(segments), len(others))
    if common < min(2, len(segments)):
        return False
    return all(map(_is_same_word, segments[-common:], others[-common:]))


def _is_same_word(word: str, other: str) -> bool:
    word, other = word.lower(), other.lower()
    if word == other or {word, other} <= LAYERS:
        return True
    same_digits = re.sub(r"\D", "", word) == re.sub(r"\D", "", other)  # layer5 is no slip for layer4
    return same_digits and min(len(word), len(other)) > 2 and _is_slip(word, other)


def _is_slip(word: str, other: str) -> bool:
    """Whether one letter too much, too little or another, or two that are swapped, are all the difference."""
    if len(word) > len(other):
        word, other = other, word
    at = next((n for n, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), len(word))
    if len(word) < len(other):
        return word[at:] == other[at + 1 :]
    swapped = word[at : at + 2] == other[at : at + 2][::-1] and word[at + 2 :] == other[at + 2 :]
    return swapped or word[at + 1 :] == other[at + 1 :]
