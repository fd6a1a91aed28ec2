"""The rule that counts the steps: calls of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from nicehooks import torch_private
from nicehooks.core import sessions
from nicehooks.core.frames import Frame, Rule, StopForward
from nicehooks.core.sessions import Progress


class StepRule(Rule):
    """Counts the steps of the root model, and ends a forward that was stopped."""

    __slots__ = ()

    def before(self, frame: Frame) -> None:
        self.session.called = True
        if not torch.compiler.is_compiling() and not torch_private.in_backward():
            sessions.new_round(self.session)
        sessions.note_export(self.session)
        if not self.session.counting:
            return
        progress = self.session.progress()
        if progress.depth == 0:
            if not progress.rooted and progress.part is not None:  # a part that ran alone before: of the first step
                progress.start()
            progress.rooted, progress.part = True, None
            progress.next_step()
        frame.enter(Deeper(progress))

    def caught(self, stop: StopForward) -> bool:
        self.session.stopped = True
        return stop.session is self.session and self.session.progress().depth == 1


class Deeper(AbstractContextManager[None]):
    """Inside a call that steps are counted by."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        self.progress.depth += 1

    def __exit__(self, *_: object) -> None:
        self.progress.depth -= 1
