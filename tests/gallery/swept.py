"""Models for sweeps: what is none of the usual transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Convolutions(nn.Module):
    """Two convolutions with a residual connection, a batch norm and an in-place layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(pictures)))
        x = self.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    """An LSTM over embeddings, batch first, whose last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out, (hidden, _) = self.lstm(self.embed(ids))
        return self.head(hidden[-1] + out.mean(1))


class Looped(nn.Module):
    """One block three times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


class SequenceFirst(nn.Module):
    """A transformer layer of torch's own, with the positions in the first dimension and the batch in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))[-1]


class MeanOfBatch(nn.Module):
    """What an example becomes depends on the other examples of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        return self.b(x - x.mean(0, keepdim=True))


class Small(nn.Module):
    """A model that has no memory for more than some rows."""

    def __init__(self, most):
        super().__init__()
        self.layer, self.most = nn.Linear(4, 4), most

    def forward(self, x):
        x = self.layer(x).tanh()
        if x.shape[0] > self.most:
            raise torch.OutOfMemoryError("no memory left")
        return x


class ResidualBlock(nn.Module):
    """Adds to its input what two layers make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    """Linear in what its layer gives in each of two calls: there the first order is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.a(x.flip(1))


class FirstCallCounts(nn.Module):
    """A layer that is called twice, of which nobody looks at the last result."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.a(y)
        return y


class CountsRuns(nn.Module):
    """Gives something else in each run, without a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.a(x) * self.runs


class Mixing(nn.Module):
    """Mixes its rows by a mask that has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.b(mask @ self.a(x))
