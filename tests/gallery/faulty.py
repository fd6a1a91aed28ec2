"""Models with one fault each, which a check of hook points has to find, and one that is only noisy."""

from __future__ import annotations

import torch
from torch import nn


class Noisy(nn.Module):
    """Draws random numbers, moves its buffers, overwrites its input, and counts nothing."""

    def __init__(self, width=4, p=0.5):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(p)
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        self.seen = self.drop(self.norm(x.mul_(2.0)))
        return {"out": (self.seen * self.scale * self.runs,), "n": len(x)}


class Base(nn.Module):
    """A linear layer and a parameter, without a fault; the others have one each."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.fc(x) + self.shift

    @property
    def is_tapped(self):
        return "forward" in vars(self)


class Counts(Base):
    """Its result depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def forward(self, x):
        self.times += 1
        return super().forward(x) * self.times


class Lists(Base):
    """Its state is what it has in its dict."""

    def state_dict(self, *args, **kwargs):
        return dict.fromkeys(vars(self))


class Peeks(Base):
    """Adds one where something stands in for its forward."""

    def forward(self, x):
        return super().forward(x) + self.is_tapped


class Unused(Base):
    """Has a layer and a parameter that its forward does not use."""

    def __init__(self):
        super().__init__()
        self.unused, self.idle = nn.Linear(4, 4), nn.Parameter(torch.randn(4))


class Detaches(Base):
    """Loses the gradient of its layer."""

    def forward(self, x):
        return self.fc(x).detach() + self.shift


class Bends(Base):
    """Doubles the gradient where something stands in for its forward."""

    def forward(self, x):
        out = super().forward(x)
        return out.detach() + 2 * (out - out.detach()) if self.is_tapped else out


class Drops(Base):
    """Multiplies with zero, so that no edit of its layer has an effect."""

    def forward(self, x):
        return self.fc(x) * 0 + self.shift


class Rebinds(Base):
    """Puts a forward of its own over whatever stands in for it."""

    def forward(self, x):
        if self.is_tapped:
            vars(self)["forward"] = super().forward
        return super().forward(x)


class Copies(Base):
    """Makes a new module where it is copied."""

    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


class Remembers(Base):
    """Leaves a trace of having been run with hooks."""

    def unwrap_leaves(self):
        return hasattr(self, "run_with_hooks")

    def forward(self, x):
        if self.unwrap_leaves():
            vars(self)["was_hooked"] = True
        return super().forward(x)


class Refuses(Base):
    """Raises where the values of its layer are edited."""

    def forward(self, x):
        out = self.fc(x)
        assert out.abs().max() < 1, "too large"
        return out + self.shift

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
