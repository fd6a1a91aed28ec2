"""`auto_hook`: the methods of a `HookedRootModule` for a model class, or for one model, without changing what it is.

NOTE [What auto_hook adds]
To a class: descriptors. The class stays the same object, and its instances have nothing themselves.
To an instance: entries in its `__dict__`, and nothing else. They know the model by a weak reference, or it would be a
cycle and wait for the garbage collector; so they do not keep it alive, as methods of a class do. A copy of the model,
or what is unpickled, has its own: what copies it finds `__reduce_ex__` among these entries.
Either way, what the methods do is done by a view of the model, made for one call: `AutoHooks`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

from torch import nn

from nicehooks import torch_private, torch_private_tensors
from nicehooks.compat.auto_hookpoint.places_to_hook import points_of
from nicehooks.compat.transformer_lens.hook_point import HookPoint
from nicehooks.compat.transformer_lens.hooked_methods import HookedMethods
from nicehooks.compat.transformer_lens.hooked_models import first_names
from nicehooks.core.explaining import explained
from nicehooks.errors import SiteNotFound, UnsupportedModule

M = TypeVar("M", bound=nn.Module)
K = TypeVar("K", bound="type[nn.Module]")
P = TypeVar("P", bound=nn.Parameter)


@overload
def auto_hook(model: K) -> K: ...
@overload
def auto_hook(model: P) -> P: ...
@overload
def auto_hook(model: M) -> M: ...
def auto_hook(model: Any) -> Any:
    """Gives a model hook points, and the methods to use them: as a decorator of its class, or on an instance.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks.hookpoints import auto_hook
    >>> @auto_hook
    ... class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...         self.bias = nn.Parameter(torch.ones(4))
    ...     def forward(self, x):
    ...         return self.fc(x) * 2 + self.bias
    >>> model, x = Model(), torch.ones(3, 4)
    >>> list(model.hook_dict)
    ['hook_point', 'bias.hook_point', 'fc.hook_point']
    >>> model.run_with_hooks(x, fwd_hooks=[("fc.hook_point", lambda value, hook: value * 0)])[0].tolist()
    [1.0, 1.0, 1.0, 1.0]

    The model keeps its type, attributes, `state_dict`, modules and parameters, and can be copied and pickled. It gets
    `hook_dict`, `mod_dict`, `run_with_hooks`, `run_with_cache`, `hooks`, `add_hook`, `reset_hooks` and all the other
    methods of a `HookedRootModule`, and `unwrap()`, which takes them away again. What has them stays as it is.

    Each module that can be called has a hook point, `fc.hook_point`, for its output. So has each parameter that the
    forward of a module which is not PyTorch's own uses itself, `bias.hook_point`: its hooks see the result of each
    operation that the parameter enters. Hook points are no modules of the model.

    Args:
        model: a class of modules, which is returned as the same object, or a module, likewise. A parameter is returned
            as it is: the module that has it has its hook point, once that is hooked.

    Raises:
        UnsupportedModule: the class or the module has attributes of these names already; or it is PyTorch's own class.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        _decorate(model)
    elif isinstance(model, nn.Module):
        _equip(model)
    elif not isinstance(model, nn.Parameter):
        raise TypeError(f"auto_hook takes a class of torch.nn.Modules, or a torch.nn.Module, not {model!r}")
    return model


class AutoHooks(HookedMethods):
    """A view of a model with the methods that `auto_hook` gives it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        known = _known_points(model)
        self.hook_dict: dict[str, Any] = points_of(model, known)
        self.mod_dict = {name: module for name, module in first_names(model) if name} | self.hook_dict
        _renew(known, self.hook_dict)
        _renew(vars(model).get("mod_dict", {}), self.mod_dict)

    def _hooked_model(self) -> nn.Module:
        return self.model

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with super().hooks(*args, **kwargs):
            yield self.model

    def check_hooks_to_add(self, *args: Any, **kwargs: Any) -> None:
        own = getattr(type(self.model), "check_hooks_to_add", None)
        if own is not None:
            own(self.model, *args, **kwargs)

    def unwrap(self) -> nn.Module:
        """Removes every hook, and from an instance all that `auto_hook` has added to it; returns the model.

        The methods that a decorated class has are taken away from the class: `Model.unwrap()`.
        """
        self.reset_hooks(including_permanent=True)
        for name, value in list(vars(self.model).items()):
            if isinstance(value, BoundHookMethod | _ReduceHooked) or (name in DICTS and is_hooked(self.model)):
                del vars(self.model)[name]
        return self.model


DICTS = ("hook_dict", "mod_dict")
PROPERTIES = ("context_level", "is_caching")
METHODS = (
    *(name for name, _ in inspect.getmembers(HookedMethods, inspect.isfunction) if not name.startswith("_")),
    "unwrap",
)
NAMES = (*DICTS, *(name for name in METHODS if name != "check_hooks_to_add"), *PROPERTIES)
"""What a hooked class has; a hooked instance has no properties. `check_hooks_to_add` is for users to write."""

OWN_ENTRIES = (*NAMES, "__reduce_ex__")
"""What a hooked instance may have in its `__dict__`."""

_points: weakref.WeakKeyDictionary[nn.Module, dict[str, HookPoint]] = weakref.WeakKeyDictionary()
"""The hook points of the instances of decorated classes."""


def _known_points(model: nn.Module) -> dict[str, HookPoint]:
    own = vars(model).get("hook_dict")
    return _points.setdefault(model, {}) if own is None else own


def _renew(known: dict[str, Any], new: dict[str, Any]) -> None:
    """Makes `known` what `new` is; where nothing has changed it is left alone: another thread may be reading it."""
    if list(known.items()) != list(new.items()):
        known.clear()
        known.update(new)


def is_hooked(model: Any) -> bool:
    """Whether `model`, a class or an instance, has what `auto_hook` adds."""
    kind = model if isinstance(model, type) else type(model)
    of_class = isinstance(inspect.getattr_static(kind, "unwrap", None), HookMethod)
    return of_class or (kind is not model and isinstance(vars(model).get("unwrap"), BoundHookMethod))


class BoundHookMethod:
    """A method of one hooked model; see NOTE [What auto_hook adds].

    Args:
        model: the model.
        name: the name of the method.
        keep: whether it keeps the model alive, as a bound method does. What lies in the model itself may not.
    """

    def __init__(self, model: nn.Module, name: str, keep: bool = False) -> None:
        self.model: Callable[[], nn.Module | None] = (lambda: model) if keep else weakref.ref(model)
        self.keep = keep
        self.__name__ = name
        self.__doc__ = getattr(AutoHooks, name).__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        if model is None:
            raise SiteNotFound(METHOD_GONE.format(name=self.__name__))
        return getattr(AutoHooks(model), self.__name__)(*args, **kwargs)

    def __reduce__(self) -> Any:
        return BoundHookMethod, (self.model(), self.__name__, self.keep)

    def __repr__(self) -> str:
        return f"<{self.__name__} of a hooked {type(self.model()).__name__}>"


class HookMethod:
    """A method or a property of the instances of a decorated class.

    Args:
        owner: the class that was decorated.
        name: the name of the method or property.
    """

    def __init__(self, owner: type, name: str) -> None:
        self.owner = weakref.ref(owner)
        self.name = name
        self.__doc__ = getattr(getattr(AutoHooks, name, None), "__doc__", None)

    def __get__(self, model: Any, kind: Any = None) -> Any:
        if model is None:
            return self._unwrapper(kind) if self.name == "unwrap" else self
        if torch_private_tensors.is_registering() or self.name in {
            *model._modules,
            *model._parameters,
            *model._buffers,
        }:
            raise UnsupportedModule(SETS.format(kind=type(model).__name__, name=self.name))
        return (
            BoundHookMethod(model, self.name, keep=True)
            if self.name in METHODS
            else getattr(AutoHooks(model), self.name)
        )

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Calls the method of `model`, as the function of an ordinary method would."""
        return getattr(model, self.name)(*args, **kwargs)

    def __set__(self, model: Any, value: Any) -> None:
        if self.name in PROPERTIES:
            return setattr(AutoHooks(model), self.name, value)
        raise UnsupportedModule(SETS.format(kind=type(model).__name__, name=self.name))

    def _unwrapper(self, kind: Any) -> Callable[[], Any]:
        def unwrap() -> Any:
            """Removes the hooks of all instances, takes the methods away from the class, and returns the class."""
            owner: Any = self.owner()
            if owner is not kind:
                raise UnsupportedModule(INHERITED.format(kind=kind.__name__, owner=owner.__name__))
            for model in [model for model in _points if isinstance(model, owner)]:
                AutoHooks(model).unwrap()
            for name in NAMES:
                delattr(owner, name)
            return owner

        return unwrap


def _decorate(kind: type[nn.Module]) -> None:
    if is_hooked(kind):
        return
    if kind.__module__.partition(".")[0] == "torch":
        raise UnsupportedModule(OF_TORCH.format(kind=kind.__name__))
    _refuse_taken([name for name in NAMES if hasattr(kind, name)], kind)
    for name in NAMES:
        setattr(kind, name, HookMethod(kind, name))


def _equip(model: nn.Module) -> None:
    if is_hooked(model):
        return
    if torch_private.is_scripted(model):
        raise explained("nearest.scripted", "", model)
    _refuse_taken([name for name in NAMES if hasattr(model, name)], type(model))
    view = AutoHooks(model)
    _points.pop(model, None)
    methods = {name: BoundHookMethod(model, name) for name in NAMES if name in METHODS}
    vars(model).update(hook_dict=view.hook_dict, mod_dict=view.mod_dict, **methods)
    vars(model).setdefault("__reduce_ex__", _ReduceHooked(model))


class _ReduceHooked:
    """Makes a copy of an instance, of whatever kind, one that `auto_hook` is called on when it is complete."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, protocol: Any = 2) -> Any:
        model: Any = self.model()
        of_class: Any = type(model).__reduce_ex__
        reduced = of_class(model, protocol)
        if not is_hooked(model) or not isinstance(reduced, tuple) or len(reduced) < 3 or type(reduced[2]) is not dict:
            return reduced
        state = {name: value for name, value in reduced[2].items() if name not in OWN_ENTRIES}
        return (_started, reduced[:2], state, *reduced[3:])


def _started(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A copy that has no attributes yet."""
    new = make(*args)
    vars(new)["__setstate__"] = _SetState(new)
    return new


class _SetState:
    """Gives a copy its attributes, and then its hook points."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, state: dict[str, Any]) -> None:
        model: Any = self.model()
        del vars(model)["__setstate__"]
        model.__setstate__(state)
        _equip(model)


def _refuse_taken(taken: list[str], kind: type) -> None:
    if taken:
        names = ", ".join(map(repr, taken[:3])) + (", …" if len(taken) > 3 else "")
        raise UnsupportedModule(TAKEN.format(kind=kind.__name__, names=names))


TAKEN = (
    "{kind} has {names} of its own, which auto_hook would replace. Rename them;\n"
    "  or use hooked(model), which has these methods and leaves the model as it is. A HookedRootModule has them."
)

SETS = (
    "{kind} sets self.{name}, but auto_hook has given the class a method of this name. Rename the attribute;\n"
    "  or use hooked(model), which has these methods and leaves the model as it is."
)

METHOD_GONE = (
    "the model whose {name}() this is no longer exists: nothing else has it. Give it a name first:\n"
    "    model = auto_hook(Model())\n"
    "    model.{name}(…)"
)

OF_TORCH = (
    "{kind} is a class of PyTorch's own, which is there for all who use it. Hook an instance: auto_hook({kind}(…)),\n"
    "  or a class of your own that inherits from it."
)

INHERITED = "{kind} was not decorated itself, but inherits from {owner}, which was: {owner}.unwrap() undoes that."
