"""Models for hook points and for hooks by name."""

from __future__ import annotations

import torch
from torch import nn

from gallery.returning import Nothing
from gallery.toy import Toy
from nicehooks.hookpoints import HookedRootModule, HookPoint, auto_hook


class PointByHand(nn.Module):
    """A hook point for the result of a function, written by hand."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu_hook_point = nn.Linear(2, 2), HookPoint()

    def forward(self, x):
        return self.relu_hook_point(torch.relu(self.fc(x)))


@auto_hook
class Decorated(nn.Module):
    """Has parameters, layers, and a layer with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.layer = nn.ModuleList([ShiftedBlock(), ShiftedBlock()])
        self.extra = None

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return x * self.scale


class ShiftedBlock(nn.Module):
    """A linear layer, a ReLU, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.relu(self.fc(x)) + self.shift


class Undecorated(nn.Module):
    """`Decorated` without hook points, around the layers of one."""

    @staticmethod
    def of(model):
        plain = Undecorated()
        plain.scale, plain.layer, plain.extra = model.scale, model.layer, model.extra
        return plain

    forward = Decorated.forward


class AutoencoderWithPoints(HookedRootModule):
    """The autoencoder with hook points written by hand."""

    def __init__(self, plain):
        super().__init__()
        for name, parameter in plain.named_parameters():
            setattr(self, name, parameter)
            setattr(self, f"{name}_hook_point", HookPoint())
        self.setup()

    def forward(self, x):
        x = self.b_dec_hook_point(x - self.b_dec)
        acts = torch.relu(self.b_enc_hook_point(self.W_enc_hook_point(x @ self.W_enc) + self.b_enc))
        return self.b_dec_hook_point(self.W_dec_hook_point(acts @ self.W_dec) + self.b_dec)


class OwnLinear(nn.Linear):
    """A forward of torch's own in a class of one's own: its weight has no hook point."""


class HoldsParameters(nn.Module):
    """Has lists and dicts of parameters, one parameter under two names, and a layer of a class of its own."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4)])
        self.by_name = nn.ParameterDict({"up": torch.randn(4)})
        self.odd, self.norm = OwnLinear(4, 4), nn.LayerNorm(4)
        self.first = self.second = nn.Parameter(torch.randn(4))
        self.later = None

    def forward(self, x):
        return self.norm(self.odd(x * self.weights[0] + self.by_name["up"])) * self.first


class TensorAndDict(nn.Module):
    """Returns a tensor, and a dict with a tensor in it."""

    def forward(self, x):
        return x * 2, {"b": x * 3, "n": 7}


class Count(nn.Module):
    """Returns a number."""

    def forward(self, x):
        return len(x)


@auto_hook
class ReturnsAllSorts(nn.Module):
    """Calls what returns trees, nothing, and what is no tensor."""

    def __init__(self):
        super().__init__()
        self.two, self.nothing, self.count = TensorAndDict(), Nothing(), Count()

    def forward(self, x):
        a, b = self.two(x)
        self.nothing(x)
        return a + b["b"] * self.count(x)


class Taken(nn.Module):
    """Has an attribute of the name that hooks need, if it is told so."""

    def __init__(self, attribute=None):
        super().__init__()
        if attribute is not None:
            self.hooks = attribute

    def forward(self, x):
        return x


class NamesOfExamples(nn.Module):
    """A model with every name that the examples of nice_hooks use."""

    def __init__(self):
        super().__init__()
        self.path = nn.Module()
        self.path.add_module("to_", nn.Module())  # nn.Module has a method `to`, so no child is called that
        self.path.to_.module = nn.Linear(4, 4)
        self.mod1 = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.mod2 = nn.Linear(5, 2)

    def forward(self, x, scale=1.0):
        return self.mod2(self.mod1(self.path.to_.module(x))) * scale


class AsksBack(Toy):
    """Remembers which hooks it was asked about."""

    def __init__(self):
        self.seen = []
        super().__init__()
        self.is_caching, self.context_level = False, 0  # plain attributes elsewhere

    def check_and_add_hook(self, hook_point, hook_point_name, hook, *args, **kwargs):
        self.seen.append((hook_point_name, hook, args, kwargs))
        super().check_and_add_hook(hook_point, hook_point_name, hook, *args, **kwargs)


class OwnPoint(HookPoint):
    """Remembers which hooks were added."""

    def __init__(self):
        super().__init__()
        self.added = []

    def add_hook(self, hook, dir="fwd", is_permanent=False, level=None, prepend=False, alias_names=None):
        self.added.append((dir, level))
        return super().add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)


class WithOwnPoint(HookedRootModule):
    """Has a hook point of a class of its own, and a plain one."""

    def __init__(self):
        super().__init__()
        self.mine, self.plain = OwnPoint(), HookPoint()
        self.setup()

    def forward(self, x):
        return self.plain(self.mine(x) + 1)
