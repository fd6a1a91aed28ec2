"""Functions in the place of contexts: a participle transforms a model into a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.patching import patch
from nicehooks.core.census import Census
from nicehooks.core.children import unwrap
from nicehooks.core.selection import Where
from nicehooks.errors import SiteNotFound, TreeMismatch


def captured(model: nn.Module, *where: Where, **options: Any) -> Callable[..., tuple[Any, ActivationCache]]:
    """A function with the model's signature that returns `(output, activations)`.

    So activations leave a `torch.func` transform as ordinary outputs:

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> output, acts = torch.vmap(captured(model, "0"))(torch.ones(5, 4))
    >>> acts["0"].shape
    torch.Size([5, 3])

    Args:
        model: any module.
        where: paths, sites, … (see `select`); every module if there is none.
        options: as for `capture`.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, ActivationCache]:
        with capture(model, *where, **options) as acts:
            output = model(*args, **kwargs)
        return output, acts

    return run


def functional(model: nn.Module, *where: Where) -> Callable[..., tuple[Any, ActivationCache]]:
    """The pure function `f(params, *args, patches=None, **kwargs) -> (output, activations)`.

    It is differentiable in each of its three arguments: parameters, patches, inputs.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> params, x = dict(model.named_parameters()), torch.ones(5, 4)
    >>> f = functional(model, "0")
    >>> output, acts = f(params, x, patches={"0[:, 0]": 7.0})
    >>> acts["0"][0, 0].item()
    7.0
    >>> torch.func.grad(lambda params: f(params, x)[0].sum())(params)["0.weight"].shape
    torch.Size([3, 4])

    Args:
        model: any module. Its own parameters stand in for those that `params` does not name.
        where: what the activations are of: paths, sites, … (see `select`); every module if there is none.

    Raises:
        SiteNotFound: `params` names something that is no parameter or buffer of the model.
        TreeMismatch: `params` has two values for one parameter, under two names.
    """

    def run(
        params: Mapping[str, Tensor], *args: Any, patches: Mapping[Any, Any] | None = None, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        with ExitStack() as stack:
            if patches:
                stack.enter_context(patch(model, patches))
            acts = stack.enter_context(capture(model, *where))
            everywhere = _for_every_place(model, params)
            output = torch.func.functional_call(unwrap(model), everywhere, args, kwargs, tie_weights=False)
        return output, acts

    return run


def _for_every_place(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`params` for every place that a parameter is tied to, with one name per place.

    `functional_call` cannot put back one submodule that it finds under two names, so it is told of each place once, and
    not left to find ties by itself.
    """
    census = Census(model)
    places: dict[int, list[str]] = {}  # of each tensor
    for name, module in {census.first[id(m)]: m for m in census.names.values()}.items():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            places.setdefault(id(tensor), []).append(f"{name}.{own}" if name else own)
    given: dict[int, str] = {}
    for name, value in params.items():
        owner, _, own = name.rpartition(".")
        module = census.names.get(owner)
        held = {} if module is None else {**module._parameters, **module._buffers}
        if own not in held:
            raise SiteNotFound(f"{type(census.root).__name__} has no parameter or buffer {name!r}.")
        first = given.setdefault(id(held[own]), name)
        if params[first] is not value:
            raise TreeMismatch(f"{first!r} and {name!r} are one parameter, but came with two values.")
    return {place: params[name] for tensor, name in given.items() for place in places[tensor]}
