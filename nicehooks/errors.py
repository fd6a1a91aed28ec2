"""The tree of exceptions, and of warnings: what happened, where, and the line to write instead."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings


class NiceHooksError(Exception):
    """The base of every error that this library raises."""


class PathError(NiceHooksError, ValueError):
    """A path is not written in the path language; the message has a caret under the place."""


class SiteNotFound(NiceHooksError, LookupError):
    """A path is well written but selects nothing in this model; the message has the nearest names."""


class NotCaptured(SiteNotFound, KeyError):
    """A cache was asked for a site that it does not hold."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class SiteNotReached(NiceHooksError):
    """A site was selected, but no forward call came by while the context was active."""


class TreeMismatch(NiceHooksError, TypeError):
    """A value does not fit the place that it was meant for: another structure, shape or index."""


class FileFault(NiceHooksError, OSError):
    """A file of activations cannot be read or written: it is damaged, or something else than it should be."""


class FileMissing(FileFault, FileNotFoundError):
    """A file of activations, or the folder that it should be written into, is not there."""


class UnsupportedModule(NiceHooksError):
    """A module (or a port of it) that this library cannot reach."""


class StaleActivation(NiceHooksError):
    """A captured value can no longer be used: it was overwritten in place, or belongs to a transform that is over."""


class ContextMisuse(NiceHooksError, RuntimeError):
    """An intervention was entered or attached while it was active already, or not on every rank of a group."""


class HookCheckFailed(NiceHooksError, RuntimeError):
    """`check_auto_hook(…, strict=True)` has found something that hooks do not do as they should on this model."""


class SweepMismatch(NiceHooksError, RuntimeError):
    """Runs of a sweep that should be equal are not: the model draws random numbers, or changes from run to run."""


class HooksMisuse(NiceHooksError, ValueError):
    """Hooks in a tree were put together, or called, in a way that cannot work."""


class NoSuchHooks(SiteNotFound, AttributeError):
    """A tree of hooks has no place of this name; the message has those that it has."""


class NiceHooksWarning(UserWarning):
    """The base of every warning that this library gives."""


class NotCalledWarning(NiceHooksWarning):
    """A context was left in which the model was not called at all."""


class NotReachedWarning(NiceHooksWarning):
    """A handle was removed, and one of its sites was never reached."""


class CheckpointWarning(NiceHooksWarning):
    """An edit acted in an activation-checkpointed region, and the context was left before backward ran it again."""


class HookCheckWarning(NiceHooksWarning):
    """`check_auto_hook` has found something that hooks do not do as they should on this model."""


def warn_caller(text: str, kind: type[Warning]) -> None:
    """Warns in the line that called this library, however deep in it the reason was found."""
    frame, level = inspect.currentframe(), 1
    inner = (*_OUR_FILES, os.path.dirname(str(sys.modules["torch"].__file__)) + os.sep)
    while frame is not None and frame.f_code.co_filename.startswith(inner):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, kind, stacklevel=level)


_OUR_FILES = (os.path.dirname(__file__) + os.sep, contextlib.__file__)
"""Files whose lines are not the caller's: those of this library, and those by way of which it is called."""
