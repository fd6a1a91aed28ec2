"""Methods as modules: a method of a class becomes a submodule of each instance, so that a path can lead to it.

NOTE [A submodule that is no child]
A method's module has to know the module whose method it is. As a child in `_modules` it would close a circle, and
everything that walks through a model (`named_modules`, `state_dict`, `to`, `repr`, `copy.deepcopy`, `pickle`) would
meet it. So it is in no table of the instance: the class has a descriptor in the place of the method, which hands out
the module of the instance that asks, and a `Census` of a model asks for it. The module knows its instance by a weak
reference, and is dropped with it. The descriptor has no `__set__`, so an attribute of the instance's own goes first, as
before any method.

NOTE [Whose method it is]
A subclass that overrides a method has another method of the same name. An instance has the module for the method that
a look-up on its class finds; the overridden one, which `super()` finds, is called as the plain method that it is. To
reach the method of the subclass, patch the subclass.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from nicehooks.core.children import add_further
from nicehooks.core.exclusive import Exclusive
from nicehooks.errors import ContextMisuse, NotReachedWarning, UnsupportedModule, warn_caller


class MethodModule(nn.Module):
    """A method of one module, as a module; see NOTE [A submodule that is no child]."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_owner"] = weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The module whose method it is."""
        return self.__dict__["_owner"]()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of it alone is the same method of a copy of its owner, as it is of a bound method."""
        return getattr, (self.owner, type(self).__name__.rpartition(".")[2])


class _MethodAsModule:
    """The descriptor that stands in the place of a method.

    Attributes:
        kind: the class that has it.
        name: the name of the method.
        raw: what a look-up on the class found before: a function, a `staticmethod`, a `classmethod`.
        function: what is called in the end.
        is_own: whether that was the class's own, and not inherited.
        users: the handles that keep it there.
        modules: the modules, by the `id` of the instance.
        by_children: the same, by the `id` of the instance's table of children.
    """

    def __init__(self, kind: type, name: str) -> None:
        self.kind = kind
        self.name = name
        found: Any = inspect.getattr_static(kind, name)
        self.raw: Any = found.raw if isinstance(found, _MethodAsModule) else found  # the base class is patched, too
        self.function: Any = getattr(self.raw, "__func__", self.raw)
        self.is_own = name in vars(kind)
        self.users: list[Any] = []
        self.modules: dict[int, MethodModule] = {}
        self.by_children: dict[int, MethodModule] = {}
        self.module_class = _module_class(self)
        self.__doc__ = getattr(self.raw, "__doc__", None)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self.raw.__get__(None, owner)
        found = self.modules.get(id(instance))
        if found is None and not torch.compiler.is_compiling() and self.is_found_on(type(instance)):
            found = self.module_of(instance)
        return self.plain(instance) if found is None else found

    def plain(self, instance: Any) -> Any:
        """The method itself, as Python would hand it out; Dynamo cannot trace that, but it can trace a `partial`."""
        if torch.compiler.is_compiling():
            return partial(self.function, *self.leading(instance))
        return self.raw.__get__(instance, type(instance))

    def leading(self, instance: Any) -> tuple[Any, ...]:
        """What the function takes before the arguments of a call: the instance, its class, or nothing."""
        if isinstance(self.raw, staticmethod):
            return ()
        return (type(instance),) if isinstance(self.raw, classmethod) else (instance,)

    def is_found_on(self, kind: type) -> bool:
        """Whether a look-up on `kind` finds this one; see NOTE [Whose method it is]."""
        return next((vars(base)[self.name] for base in kind.__mro__ if self.name in vars(base)), None) is self

    def module_of(self, instance: nn.Module) -> MethodModule:
        """The module of `instance`, made at the first time of asking; a stand-in for a module shares its tables."""
        with Exclusive():
            children = id(vars(instance)["_modules"])
            found = self.by_children.get(children)
            if found is None:
                found = self.by_children[children] = self.modules[id(instance)] = self.module_class(instance)
                weakref.finalize(instance, self._forget, id(instance), children).atexit = False
            return found

    def _forget(self, instance: int, children: int) -> None:
        self.modules.pop(instance, None)
        self.by_children.pop(children, None)


def _module_class(method: _MethodAsModule) -> type[MethodModule]:
    """The class of the modules: its `forward` has the signature of the method, so that paths know the arguments."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method.function(*method.leading(self.owner), *args, **kwargs)

    first = [] if inspect.isfunction(method.raw) else [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    own = inspect.signature(method.raw.__get__(None, method.kind))
    forward.__signature__ = own.replace(parameters=[*first, *own.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = method.__doc__
    return type(f"{method.kind.__name__}.{method.name}", (MethodModule,), {"forward": forward})


_patched: dict[tuple[type, str], _MethodAsModule] = {}


def method_modules(module: nn.Module) -> Iterator[tuple[str, MethodModule]]:
    """The methods of `module` that are modules now, by name."""
    for method in list(_patched.values()):
        if isinstance(module, method.kind) and method.name not in vars(module) and method.is_found_on(type(module)):
            yield method.name, method.module_of(module)


def has_method_modules() -> bool:
    """Whether any method is a module now."""
    return bool(_patched)


add_further(method_modules, has_method_modules)


# --- the public edge --------------------------------------------------------------------------------------------------


class MethodHandle:
    """Keeps a method a module: `remove`, or the end of a `with`, makes it a method again."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind = kind
        self.name = name

    def __enter__(self) -> MethodHandle:
        if not self.active:
            raise ContextMisuse(f"this {self!r} was removed; make a new one.")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"patch_method_to_module({self.kind.__name__}, {self.name!r})"

    @property
    def active(self) -> bool:
        """Whether the handle still keeps the method a module."""
        method = _patched.get((self.kind, self.name))
        return method is not None and any(user is self for user in method.users)

    def remove(self) -> None:
        """Puts the method back, unless another handle still needs it; once removed, does nothing."""
        with Exclusive():
            method = _patched.get((self.kind, self.name))
            if method is None or not self.active:
                return
            method.users = [user for user in method.users if user is not self]
            if method.users:
                return
            del _patched[self.kind, self.name]
            _method_put_back(method)
            in_use = any(["forward" in vars(module) for module in method.modules.values()])
        if in_use:
            warn_caller(IN_USE.format(handle=self), NotReachedWarning)


IN_USE = (
    "{handle} was removed while something acts on this method: from here on that does nothing. "
    "Leave the contexts and remove the hooks on it first."
)


def _method_put_back(method: _MethodAsModule) -> None:
    """Restores the class, unless somebody else has set the attribute meanwhile."""
    if vars(method.kind).get(method.name) is not method:
        return
    if method.is_own:
        setattr(method.kind, method.name, method.raw)
    else:
        delattr(method.kind, method.name)


def patch_method_to_module(cls: type[nn.Module], name: str) -> MethodHandle:
    """Makes a method of a class a submodule of its instances, so that paths and hooks can reach what it returns.

    >>> import torch
    >>> from torch import nn
    >>> from nicehooks import capture
    >>> class Attention(nn.Module):
    ...     def scores(self, q, k):
    ...         return q @ k.mT
    ...     def forward(self, x):
    ...         return self.scores(x, x).softmax(-1) @ x
    >>> model = nn.Sequential(Attention())
    >>> with patch_method_to_module(Attention, "scores"), capture(model, "0.scores", "0.scores@input['q']") as acts:
    ...     _ = model(torch.ones(5, 4))
    >>> acts["0.scores"].shape, acts["0.scores@input['q']"].shape
    (torch.Size([5, 5]), torch.Size([5, 4]))

    It holds for every instance, also for those that exist already, in every thread, from this call until the handle is
    removed. Nothing is added to any instance: `state_dict`, `named_modules`, copies and files of a model stay as they
    are. A call of the method from anywhere is then a call of the module, so that the hooks of PyTorch act there, too.

    Args:
        cls: the class; its subclasses, too, unless they override the method.
        name: the method: an ordinary one, a static or a class method, also an inherited one.

    Returns:
        A handle: `.remove()`, or the end of a `with` on it, makes the module a method again.

    Raises:
        UnsupportedModule: there is no such method, or it is none that could be a module: a property, say, or `forward`,
            whose result is that of the module itself.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        shown = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        instead = (
            f"patch_method_to_module({shown}, …)" if isinstance(cls, nn.Module) else "a subclass of torch.nn.Module"
        )
        raise TypeError(f"patch_method_to_module(cls, name) takes a class of modules, not {shown}: write {instead}")
    with Exclusive():
        method = _patched.get((cls, name))
        if method is None or vars(cls).get(name) is not method:
            _refuse(cls, name)
            method = _patched[cls, name] = _MethodAsModule(cls, name)
            setattr(cls, name, method)
        handle = MethodHandle(cls, name)
        method.users.append(handle)
        return handle


def _refuse(cls: type[nn.Module], name: str) -> None:
    """Says so if the method cannot be a module."""
    raw: Any = inspect.getattr_static(cls, name, None)
    where = f"{cls.__name__}.{name}"
    if raw is None:
        methods = [n for n in dir(cls) if not hasattr(nn.Module, n) and callable(getattr(cls, n, None))]
        raise UnsupportedModule(f"there is no {where}. The methods of {cls.__name__}: {', '.join(methods) or 'none'}.")
    if name == "forward":
        raise UnsupportedModule(f"{where} is what the module itself does: its result is at the path of the module.")
    if hasattr(nn.Module, name) or (name.startswith("__") and name.endswith("__")):
        raise UnsupportedModule(f"{where} belongs to every nn.Module, and PyTorch or Python calls it by itself.")
    if isinstance(raw, property) or not callable(getattr(cls, name)):
        kind = type(raw).__name__
        raise UnsupportedModule(f"{where} is no method but a {kind}: nothing calls it, so there is no result to reach.")
    if not isinstance(raw, staticmethod | classmethod | _MethodAsModule) and not inspect.isfunction(raw):
        raise UnsupportedModule(f"{where} is a {type(raw).__name__}, which is bound in a way of its own.")
    if issubclass(cls, torch.jit.ScriptModule):
        raise UnsupportedModule(f"{cls.__name__} is TorchScript, which runs its methods outside of Python.")
