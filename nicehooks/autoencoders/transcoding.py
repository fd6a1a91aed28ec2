"""`transcoder`: what a module makes of its input, made by a transcoder in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nicehooks.contexts.changes import edit, error_of, through
from nicehooks.core.selection import Where, select
from nicehooks.errors import SiteNotFound, TreeMismatch
from nicehooks.values import trees


class transcoder:
    """Lets a transcoder do the work of a module: its output becomes what `module` makes of its input.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> instead = nn.Linear(8, 8)
    >>> with transcoder(model, "2", instead), capture(model, "1") as acts:
    ...     output = model(torch.randn(3, 4))
    >>> torch.equal(output, instead(acts["1"]))
    True

    A transcoder imitates an MLP through sparse latents (Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944). The
    module still runs, so that `error=True` can add what the transcoder misses. It is a context and a handle, like an
    intervention.

    Args:
        model: any module.
        where: the path of the module, an MLP, say.
        module: what is asked in its place; `load_sae` gives one.
        error: adds back what `module` missed, as a constant: the output stays what it was until something acts on the
            latents.
        source: the path of what `module` gets, where that is not the first argument of the module at `where`.

    Raises:
        SiteNotFound: `where` selects nothing, or more than one module.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        module: Callable[[Tensor], Tensor],
        error: bool = False,
        source: Where | None = None,
    ) -> None:
        if not callable(module):
            raise TypeError(f"transcoder(model, where, module) takes a module, not {type(module).__name__}")
        found = select(model, where)
        if len(found) != 1:
            raise SiteNotFound(f"transcoder(model, where, …) takes one module, and {len(found)} are selected.")
        self.module = module
        self.error = error
        self._seen = threading.local()
        self._reads = edit(model, f"{found[0]}@input[0]" if source is None else source, self._read)
        self._writes = edit(model, found[0], self._write)

    def _read(self, value: Any) -> None:
        self._seen.value = value

    def _write(self, value: Any) -> Tensor:
        new = through(self.module, self._seen.value)
        if not isinstance(value, Tensor) or new.shape != value.shape:
            raise TreeMismatch(f"{trees.structure_of(new)} came out of the transcoder for {trees.structure_of(value)}")
        return new + error_of(self.module, self._seen.value, value, new) if self.error else new

    def __enter__(self) -> transcoder:
        self._reads.__enter__()
        try:
            self._writes.__enter__()
        except BaseException:
            self._reads.remove()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._writes.__exit__(*error)
        finally:
            self._reads.__exit__(*error)
            self._seen = threading.local()

    def attach(self) -> transcoder:
        """Makes it persistent and process-wide."""
        self._reads.attach()
        self._writes.attach()
        return self

    def remove(self) -> None:
        """Ends it."""
        self._writes.remove()
        self._reads.remove()
