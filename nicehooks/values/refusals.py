"""What torch refuses to do with a value, said as an error of this library.

Functions here are called in traced code too, so this is a plain `try` and `except` where it is used: Dynamo does not
trace every context manager.
"""

from __future__ import annotations

import torch

from nicehooks.errors import NiceHooksError, TreeMismatch

TORCH_ERRORS = (RuntimeError, IndexError, TypeError, ValueError, OverflowError)
"""What torch raises where a value does not fit: NotImplementedError is a RuntimeError."""


def refused(error: Exception, what: str) -> Exception:
    """The error to raise for `error`, one of `TORCH_ERRORS`: that `what` did not work, and torch's own first line.

    An accelerator without memory is no fault of a value, and what is an error of this library already stays that.
    """
    if isinstance(error, NiceHooksError | torch.OutOfMemoryError):
        return error
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return TreeMismatch(f"{what} ({said})" if said else what)
