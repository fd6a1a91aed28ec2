"""Running a model that was compiled as it was written, where autograd has to see every place in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from nicehooks import torch_private_tensors


class _Users:
    """Those for whom compiled code runs as it was written.

    torch knows one stance for the whole process: the first user takes it, and the last one puts back what was there.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.stance = ExitStack()

    def come(self) -> None:
        with self.lock:
            if self.count == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.count += 1

    def go(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.stance.close()


_USERS = _Users()


@contextmanager
def uncompiled(model: nn.Module) -> Generator[None]:
    """Inside it, `model` and what is in it run as they were written, if any of them was compiled."""
    if "torch._dynamo" not in sys.modules or not any(map(torch_private_tensors.is_compiled, model.modules())):
        yield
        return
    _USERS.come()
    try:
        yield
    finally:
        _USERS.go()
