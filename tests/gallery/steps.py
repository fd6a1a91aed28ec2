"""Models under wrappers: whose outermost forward is another one than that of the model."""

from __future__ import annotations

from torch import nn


class Wrapper(nn.Module):
    """Calls the model inside of it from a method, and is never called itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        raise AssertionError("not called here")

    def generate(self, x, steps=3):
        return [self.inner(x) for _ in range(steps)]


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x) + self.layer(x)


class EncoderDecoder(nn.Module):
    """Generation calls the encoder alone, and then the whole for each token."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()

    def forward(self, encoded):
        return self.decoder(encoded)

    def generate(self, x, steps=3):
        encoded = self.encoder(x)
        return [self(encoded) for _ in range(steps)]


class Deep(EncoderDecoder):
    """As the model in it, which is never called through this one."""

    def __init__(self):
        super().__init__()
        self.base = EncoderDecoder()

    def generate(self, x, steps=3):
        return self.base.generate(x, steps)


class Both(Wrapper):
    """A wrapper whose own forward runs, too."""

    def forward(self, x):
        return self.inner(x)
