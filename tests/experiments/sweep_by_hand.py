"""What a sweep is held against: the plain loop over contexts, and models of other kinds than transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import capture, edit, patch
from nicehooks.experiments.grids import stems_of


def plain_loop(model: nn.Module, effects: Any, value_at: Any, metric: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The metric under a context of its own for each cell, in the order of the grid."""
    found: list[Tensor] = []
    with torch.no_grad():
        for path in effects.sites:
            value = value_at(path)
            context = edit(model, path, value) if callable(value) else patch(model, path, value)
            with context:
                found.append(metric(model(*args, **kwargs)))
    return torch.stack(found)


def far_from_loop(model: nn.Module, effects: Any, value_at: Any, metric: Any, *args: Any, **kwargs: Any) -> float:
    """How far the effects are from those of the plain loop, at most, in parts of the largest of these."""
    with torch.no_grad():
        baseline = metric(model(*args, **kwargs))
    expected = plain_loop(model, effects, value_at, metric, *args, **kwargs) - baseline
    found = effects.values.flatten() if effects.examples is None else effects.examples.reshape(expected.shape)
    assert expected.abs().max() > 0, "a sweep in which nothing has an effect proves nothing"
    return ((found - expected).abs().max() / expected.abs().max()).item()


def recorded(model: nn.Module, where: Any, *args: Any, **kwargs: Any) -> Any:
    """The values around the sites in a run."""
    with torch.no_grad(), capture(model, *stems_of(model, where), clone=True) as seen:
        model(*args, **kwargs)
    return seen


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


def made(kind: type[nn.Module], seed: int = 0) -> Any:
    """A model of `kind` in evaluation mode."""
    torch.manual_seed(seed)
    model = kind().eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    return model
