"""Every touch of a private torch API, each dated with the torch version that needs it: what the core asks.

`torch_private_tensors` has those that work on tensors and containers.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

Fn = TypeVar("Fn", bound=Callable[..., Any])


def evaluated_while_tracing(function: Fn) -> Fn:
    """Lets Dynamo call `function` while it traces, and take the result as a constant (torch 2.4 … 2.13).

    What `torch.compiler.assume_constant_result` does, but that imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def break_graph(why: str) -> None:
    """Ends the graph that Dynamo makes, if it makes one; under `fullgraph=True` it raises, and says `why`."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=why)


innermost_transform: Callable[[], Any] = functorch.peek_interpreter_stack
"""The innermost running `torch.func` transform, or None."""


transforms_running: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: innermost_transform() is not None
)
"""Whether any `torch.func` transform runs in this thread: cheap enough for every captured value (torch 2.4 … 2.13)."""


@evaluated_while_tracing
def transform_level() -> int:
    """How many `torch.func` transforms are running around this line."""
    transform = innermost_transform()
    return 0 if transform is None else transform.level()


version_counter: Callable[[Tensor], int] = operator.attrgetter("_version")
"""The version counter of a tensor; raises `RuntimeError` for one made under `inference_mode` (torch 2.4 … 2.13)."""


def in_backward() -> bool:
    """Whether a backward pass runs in this thread (torch 2.4 … 2.13)."""
    return torch._C._current_graph_task_id() != -1


def context_of_backward() -> Context | None:
    """The context in which the backward pass around this line was started.

    Autograd runs what is on an accelerator in threads of its own, and carries the context along (torch 2.6 … 2.13).
    """
    if not in_backward() or not torch._C._is_key_in_tls("context"):
        return None
    return torch._C._get_obj_in_tls("context")


def in_checkpoint() -> bool:
    """Whether this line runs in an activation-checkpointed region whose forward backward will run again."""
    for frame in _checkpointed_frames():
        needed = getattr(frame.f_locals.get("ctx"), "needs_input_grad", None)
        return torch.is_grad_enabled() if needed is None else any(needed)
    return False


def checkpoint_depth() -> int:
    """How deep this line is in activation-checkpointed regions, in frames of torch's own."""
    return len(list(_checkpointed_frames()))


def _checkpointed_frames() -> Iterator[Any]:
    """The frames of torch's own around this line, the innermost first.

    torch (2.4 … 2.13) leaves no other mark of a checkpointed region than its frames on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == CHECKPOINT_FILE:
            yield frame
        frame = frame.f_back


CHECKPOINT_FILE = torch.utils.checkpoint.__file__


def tracing_lock() -> list[Any]:
    """The lock that Dynamo holds while it traces, if it is loaded (torch 2.4 … 2.13)."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    lock = getattr(convert_frame, "compile_lock", None)
    return [] if lock is None else [lock]


@evaluated_while_tracing
def is_exporting() -> bool:
    """Whether `torch.export` runs around this line (torch 2.7 … 2.13; False before)."""
    return _is_exporting()


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


no_forward = nn.Module.forward
"""What `type(module).forward` is for containers that define none (torch 2.4 … 2.13)."""


WRAPPED_CHILD = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Wrappers that stand transparently around one child, and its name in them (torch 2.4 … 2.13)."""


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that `module` transparently wraps, if it is such a wrapper."""
    name = WRAPPED_CHILD.get(type(module).__name__)
    return name if name is not None and type(module).__module__.startswith("torch.") else None


def nested_sizes(tensor: Tensor) -> list[int | str]:
    """The sizes of a nested tensor, `*` for a dimension in which its tensors differ (torch 2.4 … 2.13)."""
    if tensor.layout is torch.jagged:
        return [size if type(size) is int else "*" for size in tensor.shape]
    sizes = tensor._nested_tensor_size()
    same = [
        int(sizes[0, dim]) if bool((sizes[:, dim] == sizes[0, dim]).all()) else "*" for dim in range(sizes.shape[1])
    ]
    return [sizes.shape[0], *same]


def is_scripted(module: object) -> bool:
    """Whether `module` is TorchScript, whose forward Python never sees."""
    return isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction)
