"""Every touch of a private torch API that works on tensors and containers, each dated: see `torch_private`."""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import optree.registry
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_pop_interpreter_stack,
)
from torch._functorch.vmap import _remove_batch_dim as remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext

from nicehooks.torch_private import (
    WRAPPED_CHILD,
    evaluated_while_tracing,
    innermost_transform,
    nested_sizes,
    transform_level,
    wrapped_child,
)

eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
OnTensors = Callable[[list[Tensor]], list[Tensor]]


PutOn = Callable[[list[Tensor], OnTensors], list[Tensor]]


def lift(value: Tensor, level: int) -> Tensor:
    """`value` as seen from outside of every transform above `level`: the full batch, mapped dimensions in front.

    Each transform is popped before the next step, because an operation that runs under `grad` wraps its result again.
    """
    transform = innermost_transform()
    if transform is None or transform.level() <= level:
        return value
    own = functorch.is_functorch_wrapped_tensor(value) and functorch.maybe_get_level(value) == transform.level()
    dim = functorch.maybe_get_bdim(value) if own else -1
    size = transform_size(transform)
    with temporarily_pop_interpreter_stack():
        if own:
            value = functorch.get_unwrapped(value)
        if size is not None:  # a value that is the same for every example still has one row per example outside
            value = value.movedim(dim, 0) if own else value.expand(size, *value.shape)
        return lift(value, level)


def where_differentiated(tensors: list[Tensor], act: OnTensors, put: PutOn) -> list[Tensor] | None:
    """`put(tensors, act)` where the tensors are differentiated: here, or outside of the innermost transforms.

    For a backward that is outside of a `vmap`, `act` is mapped over the gradients of all examples. A value that is
    the same for every example has a gradient for each, so it becomes one value per example.

    Args:
        tensors: the tensors as they are here.
        act: what acts on the gradients of all of them.
        put: sees to it that a function of the gradients is called, and returns what takes the place of the tensors.

    Returns:
        what takes the place of `tensors`; None where nothing differentiates them.
    """
    transform = innermost_transform()
    size = None if transform is None else transform_size(transform)
    if size is None and any([tensor.requires_grad for tensor in tensors]):
        return put(tensors, act)
    if transform is None:
        return None
    level = transform.level()
    own = [functorch.is_functorch_wrapped_tensor(one) and functorch.maybe_get_level(one) == level for one in tensors]
    dims = [functorch.maybe_get_bdim(one) if is_own else 0 for one, is_own in zip(tensors, own, strict=True)]
    with temporarily_pop_interpreter_stack():
        inner = [functorch.get_unwrapped(one) if is_own else one for one, is_own in zip(tensors, own, strict=True)]
        if size is not None:
            out_dims: Any = dims
            act = torch.vmap(act, in_dims=(dims,), out_dims=out_dims, randomness="different")
            inner = [one if is_own else one.expand(size, *one.shape) for one, is_own in zip(inner, own, strict=True)]
        found = where_differentiated(inner, act, put)
    if found is None:
        return None
    pairs = zip(found, dims, strict=True)
    if size is not None:
        return [functorch._add_batch_dim(one, dim, level) for one, dim in pairs]
    return [functorch._wrap_for_grad(one, level) for one, _ in pairs]


def hook_gradient(tensor: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Sets `hook` on the gradient of `tensor`; returns what takes its place. See `where_differentiated`."""
    found = where_differentiated([tensor], lambda gradients: [hook(gradients[0])], _hooked)
    return None if found is None else found[0]


def _hooked(tensors: list[Tensor], act: OnTensors) -> list[Tensor]:
    tensors[0].register_hook(lambda gradient: act([gradient])[0])
    return tensors


@contextmanager
def outside_transforms(level: int) -> Generator[None]:
    """Runs what is inside it as if no transform above `level` were there.

    What `lift` returns is made into a wrapper again by any operation on it under `grad` or `jvp`.
    """
    if transform_level() <= level:
        yield
        return
    with temporarily_pop_interpreter_stack(), outside_transforms(level):
        yield


def life_of(tensor: Tensor) -> Tensor | None:
    """What tells whether `tensor`, a wrapper that belongs to a running transform, can still be used; else None.

    A wrapper of `vmap` does not know that its transform is over, and levels are counted anew each time. A wrapper of
    `grad` does know, whatever kind of transform runs at its level.
    """
    if not functorch.is_functorch_wrapped_tensor(tensor):
        return None
    level = functorch.maybe_get_level(tensor)
    return functorch._wrap_for_grad(_NOTHING, level) if 0 < level <= transform_level() else None


_NOTHING = torch.empty(0, device="cpu")


def is_over(life: Tensor) -> bool:
    """Whether the transform is over in which `life_of` has made `life`."""
    return functorch.maybe_get_level(life) < 0


is_wrapped: Callable[[Tensor], bool] = functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to a transform, running or over."""


def transform_size(transform: Any) -> int | None:
    """The number of examples that a `vmap` maps over; None for the other transforms."""
    if transform.key() != functorch.TransformType.Vmap:
        return None
    return functorch.CVmapInterpreterPtr(transform).batchSize()


def lift_traced(value: Tensor, level: int) -> Tensor:
    """`lift`, in code that is being traced: with what the transforms themselves do to their results."""
    for above, size in _running_transforms():
        if above <= level:
            break
        if size is None:
            value = functorch._unwrap_for_grad(value, above)
        else:
            value = remove_batch_dim(value, above, size, 0)
    return value


@evaluated_while_tracing
def _running_transforms() -> list[tuple[int, int | None]]:
    """The level of each running transform, and the size of a `vmap`, the innermost first."""
    found: list[tuple[int, int | None]] = []
    for transform in reversed(retrieve_all_functorch_interpreters()):
        size = transform.batch_size() if isinstance(transform, VmapInterpreter) else None
        found.append((transform.level(), size))
    return found


def flat_weights(module: nn.RNNBase) -> list[Tensor]:
    """The weights of a recurrent module in the order in which its kernel takes them (torch 2.4 … 2.13)."""
    return [getattr(module, name) for name in module._flat_weights_names]


def unwrapped(value: Tensor) -> Tensor:
    """The tensor that holds the data of `value`, inside the wrappers of all transforms."""
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return value


def version(value: Tensor) -> int:
    """The version counter of the data of `value`; a wrapper of `vmap` has one of its own, which never moves."""
    return unwrapped(value)._version


def version_traced(value: Tensor) -> int:
    """The version counter of `value` in code that is being traced: a number that is part of the graph."""
    return value._version


def requires_gradient(value: Tensor) -> bool:
    """Whether `value` requires a gradient, at whatever level: the wrapper of a `vmap` inside does not say so itself."""
    if value.requires_grad or torch.compiler.is_compiling():
        return value.requires_grad
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
        if value.requires_grad:
            return True
    return False


_as_batch: Callable[..., Tensor] = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]


_of_batch: Callable[..., Tensor] = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]


is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether autograd knows of another tensor with the memory of this one (torch 2.4 … 2.13)."""


class ComputedAnew:
    """While it is entered, and behind it, a parametrized tensor is computed anew: `parametrize.cached()` keeps none.

    Args:
        key: the identity of the module, and the name of the tensor (torch 2.4 … 2.13).
    """

    def __init__(self, key: tuple[int, str]) -> None:
        self.key = key

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            parametrize._cache.pop(self.key, None)

    def __exit__(self, *_: object) -> None:
        self.__enter__()


def each_of_batch(act: OnTensors, gradients: list[Tensor]) -> list[Tensor]:
    """`act(gradients)`, by `torch.vmap` where torch runs one backward for a batch of gradients.

    `is_grads_batched=True` and `torch.autograd.functional.jacobian(vectorize=True)` have a mapping of their own, of an
    older kind than `torch.vmap`, whose values die with it and tell nobody (torch 2.4 … 2.13).
    """
    batched = [functorch.is_legacy_batchedtensor(gradient) for gradient in gradients]
    if not any(batched):
        return act(gradients)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole = [
        _of_batch(gradient, level, 0, 0) if is_batched else gradient
        for gradient, is_batched in zip(gradients, batched, strict=True)
    ]
    dims = [0 if is_batched else None for is_batched in batched]
    new = torch.vmap(act, in_dims=(dims,), randomness="different")(whole)
    return [_as_batch(one, 0, level) for one in new]


next_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # pyright: ignore
"""The number that the next node of autograd's graph in this thread gets (torch 2.4 … 2.13)."""


sequence_number: Callable[[Any], int] = operator.methodcaller("_sequence_nr")
"""The number of a node of autograd's graph: which was made first, among those of one thread (torch 2.4 … 2.13)."""


class Parameter(NamedTuple):
    """A parameter of a torch function, by the name that Python code passes it by.

    Attributes:
        kind: its type as the schema writes it: "Tensor", "Optional[Tensor]", "List[int]", …
        by_name: whether it can be passed by name only.
        default: its default; `REQUIRED` without one.
    """

    name: str
    kind: str
    by_name: bool
    default: Any


REQUIRED: Any = object()


def overloads(name: str) -> list[list[Parameter]]:
    """The parameters of each overload of the torch function called `name` (torch 2.4 … 2.13).

    torch's own schemas: functions in C have no signature that `inspect` could read, and the lambdas of
    `torch.overrides.get_testing_overrides` leave parameters out and give some in another order.
    """
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return [[_parameter(argument) for argument in schema.arguments] for schema in schemas]


def _parameter(argument: Any) -> Parameter:
    name = "input" if argument.name == "self" else argument.name
    default = argument.default_value if argument.has_default_value() else REQUIRED
    return Parameter(name, str(argument.type), argument.kwarg_only, default)


@evaluated_while_tracing
def is_part_of_export() -> bool:
    """Whether the module that is called around this line is only a part of the one that is exported.

    Other modules are being called around it, besides those of `torch.export` itself (torch 2.7 … 2.13). In code that
    Dynamo traces (`strict=True`) there is nobody to ask.
    """
    kinds: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            kinds.append(type(frame.f_locals["self"]).__module__)
        frame = frame.f_back
    return len([kind for kind in kinds if not kind.startswith(("torch.export", "torch._export"))]) > 1


CALLS_OF_MODULE = ("_call_impl", "_wrapped_call_impl", "_slow_forward")
"""What `nn.Module.__call__` goes through on the way to `forward` (torch 2.4 … 2.13)."""


def made_by_pre_hooks(module: nn.Module) -> list[str]:
    """The names of what the pre-hooks of weight_norm, spectral_norm and pruning compute (torch 2.4 … 2.13)."""
    names = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in module._forward_pre_hooks.values()]
    return [name for name in names if isinstance(name, str)]


def nests_alike(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors that are nested in `a` have the shapes of those in `b`, one by one."""
    if a.layout is not b.layout or nested_sizes(a) != nested_sizes(b):
        return False
    if a.layout is torch.jagged:
        return torch.equal(_offsets(a), _offsets(b).to(a.device))
    return torch.equal(a._nested_tensor_size(), b._nested_tensor_size())


def _offsets(jagged: Any) -> Tensor:
    return jagged.offsets()


def nested_as(value: Tensor, other: Tensor) -> Tensor:
    """`value`, of the very nesting of `other`: torch takes two jagged tensors together only if they share offsets."""
    if value.layout is not torch.jagged or value.shape == other.shape:
        return value
    ragged: Any = value
    return torch.nested.nested_tensor_from_jagged(value.values(), _offsets(other), jagged_dim=ragged._ragged_idx)


def held_by(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a sparse or jagged one consists of (torch 2.4 … 2.13)."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is torch.jagged:
        return [tensor.values(), _offsets(tensor)]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    places = [tensor.crow_indices(), tensor.col_indices()] if by_row else [tensor.ccol_indices(), tensor.row_indices()]
    return [*places, tensor.values()]


def torch_node(kind: type) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """How `torch.utils._pytree` (torch 2.4 … 2.13) takes `kind` apart and puts it together, if it knows it."""
    node = torch_pytree.SUPPORTED_NODES.get(kind)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


def torch_names(tree: Any) -> list[Any] | None:
    """The keys, fields or positions of the children of `tree`, where they were registered (torch 2.4 … 2.13)."""
    with_keys = torch_pytree.SUPPORTED_NODES[type(tree)].flatten_with_keys_fn
    keys: list[Any] = [] if with_keys is None else [key for key, _ in with_keys(tree)[0]]
    names = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in keys]
    return names if names and all([isinstance(name, str | int) for name in names]) else None


def holds_tensors_alone(tree: Any) -> bool:
    """Whether `torch.utils._pytree` (torch 2.4 … 2.13), and so any transform, finds nothing else in `tree`."""
    return all([isinstance(leaf, Tensor) for leaf in torch_pytree.tree_leaves(tree)])


def register_torch_node(kind: type, flatten: Callable[..., Any], unflatten: Callable[..., Any]) -> None:
    """Makes `kind` a pytree for `torch.utils._pytree`, and so for `torch.func`, under its public or older name."""
    register = getattr(torch_pytree, "register_pytree_node", None) or torch_pytree._register_pytree_node
    register(kind, flatten, unflatten)


EVERY_NAMESPACE: Any = getattr(optree.registry, "__GLOBAL_NAMESPACE")
"""The namespace of optree that every caller sees (optree 0.13 … 0.20)."""


_REGISTER = tuple([method.__code__ for method in (nn.Module.register_parameter, nn.Module.register_buffer)])


def is_registering() -> bool:
    """Whether the attribute lookup that a descriptor answers is that of a module which registers something there.

    It asks whether the name is free, and then raises a KeyError that says nothing of whose attribute this is.
    """
    return sys._getframe(2).f_code in _REGISTER


def in_eager(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function` so that Dynamo, where it runs the code around in parts, does not trace what it calls."""
    return torch.compiler.disable(function)(*args) if "torch._dynamo" in sys.modules else function(*args)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of `module` runs what `torch.compile` has made of it (torch 2.4 … 2.13)."""
    own = vars(module)
    forward: Any = own.get("forward")
    made = own.get("_compiled_call_impl") is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return made or wrapped_child(module) == WRAPPED_CHILD["OptimizedModule"]


def is_backward_compiled() -> bool:
    """Whether Dynamo compiles the backward of what it compiles, too (torch 2.4 … 2.13)."""
    config = sys.modules.get("torch._dynamo.config")
    return bool(getattr(config, "compiled_autograd", False))


def unseen() -> AbstractContextManager[None]:
    """Inside it no mode and no subclass is shown the torch functions that are called (2.4 … 2.13)."""
    return torch._C.DisableTorchFunction()  # pyright: ignore[reportPrivateUsage]


@lru_cache(maxsize=8)
def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function of torch whose own lines run where a mode would take the whole call (2.4 … 2.13).

    Such a function begins by asking `has_torch_function`, which the copy finds to say no.
    """
    names = {**function.__globals__, "has_torch_function": _says_no}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _says_no(values: object) -> bool:
    return False


def in_compiled_graph() -> bool:
    """Whether the torch function around this line is called by a graph that Dynamo has made (torch 2.13).

    With `backend="eager"` such a graph is Python that calls torch functions, under the modes of the code that it was
    made of; what these did is in the graph already.
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _FUNCTION_FILES:
        frame = frame.f_back
    if frame is None or frame.f_back is None or not frame.f_code.co_filename.startswith("<eval_with_key>"):
        return False
    return frame.f_back.f_globals.get("__name__") == "torch._dynamo.eval_frame"


_FUNCTION_FILES = {inspect.getfile(part) for part in (torch.nn.functional, torch.functional, torch.overrides, Tensor)}
"""Where torch's own functions are written that call another one."""


def traced_within_others_only(kind: type) -> type:
    """Keeps Dynamo from compiling the methods of a class by themselves, where the code around them is not (2.4 … 2.13).

    It may still trace them within other code. By themselves they are ordinary code, which asks what is so just then.
    """
    left = [function.__code__ for function in vars(kind).values() if isinstance(function, FunctionType)]
    while left:
        code = left.pop()
        _run_as_it_is(code)
        left += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return kind


def _run_as_it_is(code: CodeType) -> None:
    if hasattr(eval_frame, "skip_code"):  # until torch 2.6
        eval_frame.skip_code(code)
        return
    action = eval_frame._FrameAction
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))


def is_lent_weights(module: nn.Module) -> bool:
    """Whether FSDP2 brings the whole weights of `module` before a call, and frees them after it (torch 2.4 … 2.13)."""
    return getattr(module, "_is_fsdp_managed_module", False)


flex_kernel: Any = getattr(sys.modules.get("torch._higher_order_ops.flex_attention"), "flex_attention", None)
"""The operator that `flex_attention` calls; None in a torch that has none (2.5 … 2.13)."""

FLEX_ATTENTION = "torch.nn.attention.flex_attention"


class _FlexShown(threading.local):
    """How often this thread is inside of `flex_attention_shown`."""

    def __init__(self) -> None:
        self.depth = 0


_flex_shown = _FlexShown()
_flex_lock = threading.Lock()
_flex_changes = ExitStack()
_flex_threads = 0


def is_flex_shown() -> bool:
    """Whether this thread is inside of `flex_attention_shown`."""
    return _flex_shown.depth > 0


@contextmanager
def flex_attention_shown() -> Generator[None]:
    """Inside it `flex_attention` shows its kernel to the modes of this thread, compiled or not (2.6 … 2.13).

    NOTE [How flex attention is seen]
    It is no torch function, and models call it compiled. So what is compiled runs as it is written meanwhile; that is
    one setting for all threads, where it changes no value. Then the operator in it asks the modes. What stands before
    the operator is made to let through what the steps can do, and the kernel cannot: gradients on a CPU.
    """
    global _flex_threads
    if torch.compiler.is_dynamo_compiling() or _is_being_compiled():
        yield
        return
    with _flex_lock:
        _flex_threads += 1
        if _flex_threads == 1:
            _show_flex_attention(_flex_changes)
    _flex_shown.depth += 1
    try:
        yield
    finally:
        _flex_shown.depth -= 1
        with _flex_lock:
            _flex_threads -= 1
            if _flex_threads == 0:
                _flex_changes.close()


def _is_being_compiled() -> bool:
    """Whether what is called here is compiled when it is first called: the setting may not be changed there."""
    frames = sys.modules.get("torch._C._dynamo.eval_frame")
    return frames is not None and frames.get_eval_frame_callback() not in (None, False)


def _show_flex_attention(changes: ExitStack) -> None:
    flex: Any = importlib.import_module(FLEX_ATTENTION)
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        return
    changes.enter_context(stance("force_eager"))
    validate, warned = flex._validate_device, getattr(flex, "_WARNINGS_SHOWN", set[str]())
    flex._validate_device = lambda *tensors: None if is_flex_shown() else validate(*tensors)
    changes.callback(setattr, flex, "_validate_device", validate)
    if "flex_attention_performance" not in warned:  # that it was called without being compiled
        warned.add("flex_attention_performance")
        changes.callback(warned.discard, "flex_attention_performance")


@contextmanager
def no_function_modes() -> Generator[None]:
    """Inside it no torch function mode sees a call, but for that of a default device (2.4 … 2.13)."""
    every = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    kept = [mode for mode in every if isinstance(mode, DeviceContext)]
    for mode in reversed(kept):
        torch.overrides._push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            torch.overrides._pop_mode()
        for mode in reversed(every):
            torch.overrides._push_mode(mode)


def indexed_by_tensors() -> AbstractContextManager[Any]:
    """Inside it a tensor may be indexed by the scalars of `torch.vmap`, as in a `score_mod` (2.5 … 2.13)."""
    return importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op").TransformGetItemToIndex()
