"""A small model, a run of it whose values are kept, and what a cache holds as numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from gallery.trees import SeveralKinds
from torch import Tensor

from nicehooks import (
    ActivationCache,
    capture,
)

MODEL = SeveralKinds()
X = torch.arange(6.0).reshape(2, 3)
PLUS = X + 2


def run(*where: Any, **options: Any) -> ActivationCache:
    with capture(MODEL, *where, **options) as acts:
        MODEL(X)
    return acts


def numbers(value: Any) -> Any:
    """A value with plain lists for its tensors, and plain dicts for its caches."""
    if isinstance(value, ActivationCache):
        return {key: numbers(child) for key, child in value.items()}
    return torch_pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, Tensor) else leaf, value)
