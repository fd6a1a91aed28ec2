"""Models with a stream that nobody knows by name."""

from __future__ import annotations

from torch import Tensor, nn


class StreamBlock(nn.Module):
    """Its attention and MLP add to the stream, which may then be changed by something that is no sum."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp, self.after = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
            after,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for _ in range(3))
        z = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + self.attn(z)
        return self.after(x + self.mlp(x))


class StreamModel(nn.Module):
    """A small model of nobody's family, with a stream; it counts its runs."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([StreamBlock(after), StreamBlock(nn.Identity())])
        self.head = nn.Linear(8, 20)
        self.runs = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.runs += 1
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
