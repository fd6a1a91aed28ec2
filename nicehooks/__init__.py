"""Look inside any PyTorch model, and change what happens there, through context managers.

>>> import torch
>>> from torch import nn
>>> from nicehooks import capture, patch
>>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
>>> clean, corrupted = torch.ones(5, 4), torch.zeros(5, 4)
>>> with capture(model, "*") as acts:  # what every layer returns
...     output = model(clean)
>>> acts["1"].shape
torch.Size([5, 3])
>>> with patch(model, {"1[:, 0]": acts["1[:, 0]"]}), capture(model, "2") as patched:
...     output = model(corrupted)  # one value replaced, and what comes of it
>>> patched["2"].shape
torch.Size([5, 2])
>>> vars(model[0]).keys() == vars(nn.Linear(4, 3)).keys()  # outside, the model has no trace of it
True

`capture` reads; `patch`, `edit`, `ablate`, `steer` and `splice` change, and `suspend` silences them. `captured`,
`functional` and `grad_at` are functions for `torch.func`; `sites`, `select` and `describe` say what there is, and
`anatomy` where a transformer has its parts. `sweep` does many interventions, each alone, and gives their `Effects`;
`mean_activations` is what to ablate with. What is captured is an `ActivationCache`.
"""

# ruff: noqa: F405
from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nicehooks.public import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "KEEP",
    "ActivationCache",
    "ActivationCacheLike",
    "ActivationStore",
    "AnySlice",
    "CheckpointWarning",
    "ContextMisuse",
    "Effects",
    "ModulePath",
    "NiceHooksError",
    "NiceHooksWarning",
    "NotCalledWarning",
    "NotCaptured",
    "NotReachedWarning",
    "PathError",
    "PathsLike",
    "RemovableHandleCollection",
    "Site",
    "SiteNotFound",
    "SiteNotReached",
    "StaleActivation",
    "TreeMismatch",
    "UnsupportedModule",
    "ablate",
    "acdc",
    "anatomy",
    "attention_view",
    "attribute",
    "capture",
    "captured",
    "circuit",
    "describe",
    "direct_logit_attribution",
    "edges",
    "edit",
    "expand_module_path",
    "expert_results",
    "faithfulness",
    "functional",
    "fused_attention_as_steps",
    "grad_at",
    "harvest",
    "head_results",
    "load_default",
    "load_sae",
    "logit_lens",
    "mean_activations",
    "on_the_fly",
    "patch",
    "patch_method_to_module",
    "probe",
    "register_anatomy",
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "run",
    "score_attribution",
    "select",
    "serving",
    "sites",
    "splice",
    "steer",
    "steering_vector",
    "suspend",
    "sweep",
    "to_paths",
    "transcoder",
    "versions",
]

__path__.append(os.path.join(os.path.dirname(__file__), "compat", "old_names"))  # see NOTE [Names in old pickles]


def __getattr__(name: str) -> Any:
    """The public names are loaded when the first of them is asked for, all at once: with torch that takes seconds.

    From then on they are ordinary names of this module, for Dynamo too.
    """
    if name in DOORS:
        return importlib.import_module(f"nicehooks.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("nicehooks.public")
    globals().update({each: getattr(public, each) for each in __all__})
    return globals()[name]


DOORS = ("errors", "hookpoints", "hooktrees")
"""The other modules of public names."""


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


class _Package(ModuleType):
    """This module: no submodule takes the place of a public function of its name, as Python would have it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
