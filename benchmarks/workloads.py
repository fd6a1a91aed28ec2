"""The work that `overhead.py` puts on the clock: models, and each thing done with nicehooks and by hand."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks import NotCalledWarning, grad_at, patch

Context = Callable[[], AbstractContextManager[Any]]
Work = Callable[[], Any]
LAYERS, POSITIONS, WIDTH = 12, 16, 64
BLOCKS = "transformer.h.*"
GRID = [(layer, position) for layer in range(LAYERS) for position in range(POSITIONS)]


# --- models ---


def gpt2() -> tuple[nn.Module, Tensor]:
    """The small GPT-2, and one prompt for it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), torch.arange(POSITIONS)[None]


class Alias(nn.Module):
    """The tiny layer: one new tensor over the same memory, about 1 µs, so that a raw hook on every module costs 2×."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def chain() -> tuple[nn.Module, Tensor]:
    """401 modules that do next to nothing."""
    return nn.Sequential(*(Alias() for _ in range(400))).eval(), torch.randn(1, 8)


def flat(count: int) -> nn.Module:
    """`count` modules in a row, and the model around them."""
    return nn.Sequential(*(nn.Identity() for _ in range(count)))


class Branch(nn.Module):
    """Four modules with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def branches(count: int) -> nn.Module:
    """A model of 4 × `count` modules, beside itself."""
    return nn.Sequential(*(Branch() for _ in range(count)))


# --- by hand ---


@contextmanager
def raw_hooks(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """`register_forward_hook` in a loop, into a dict."""
    activations: dict[str, Any] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            activations[name] = output

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    yield activations
    for handle in handles:
        handle.remove()


@contextmanager
def raw_patch(module: nn.Module, index: Any, value: Any) -> Iterator[None]:
    """A forward hook that copies the output and assigns to a part of it."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[index] = value
        return output

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def modules_that_run(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Without those that no forward reaches: containers, GPT-2's `attn_dropout` under fused attention."""
    with raw_hooks(dict(model.named_modules())) as seen:
        model(x)
    return {name: module for name, module in model.named_modules() if name in seen}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the small GPT-2."""
    return {name: model.get_submodule(name) for name in (f"transformer.h.{layer}" for layer in range(LAYERS))}


# --- many patches ---


def patch_loop(model: nn.Module, x: Tensor, clean: dict[str, Tensor]) -> None:
    """One fresh patch, and one forward, for each layer and position."""
    for layer, position in GRID:
        name = f"transformer.h.{layer}"
        with patch(model, {f"{name}[:, {position}]": clean[name][:, position]}):
            model(x)


def raw_patch_loop(model: nn.Module, x: Tensor, clean: dict[str, Tensor]) -> None:
    """The same with a raw hook for each."""
    for layer, position in GRID:
        name = f"transformer.h.{layer}"
        with raw_patch(model.get_submodule(name), (slice(None), position), clean[name][:, position]):
            model(x)


def patch_rows(model: nn.Module, x: Tensor, clean: dict[str, Tensor]) -> None:
    """All of them in one forward of a batch with a row for each: 192 keys, 16 at each block."""
    values = {
        f"transformer.h.{layer}[{row}, {position}]": clean[f"transformer.h.{layer}"][0, position]
        for row, (layer, position) in enumerate(GRID)
    }
    with patch(model, values):
        model(x.expand(len(GRID), -1))


def raw_patch_rows(model: nn.Module, x: Tensor, clean: dict[str, Tensor]) -> None:
    """The same by hand: a hook per block, which assigns to its 16 rows at once."""
    positions, handles = torch.arange(POSITIONS), list[Any]()
    for layer, (name, block) in enumerate(blocks_of(model).items()):

        def hook(_: Any, args: Any, output: Tensor, rows: Tensor = positions + layer * POSITIONS, to: str = name):
            output = output.clone()
            output[rows, positions] = clean[to][0]
            return output

        handles.append(block.register_forward_hook(hook))
    model(x.expand(len(GRID), -1))
    for handle in handles:
        handle.remove()


# --- gradients ---


def metric(output: Any) -> Tensor:
    """A logit difference."""
    return output.logits[0, -1, 1] - output.logits[0, -1, 2]


def gradients(context: Context, model: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Capture what a context gives, then `torch.autograd.grad`."""
    with torch.enable_grad(), context() as activations:
        value = metric(model(x))
        return torch.autograd.grad(value, list(activations.values()))


def gradients_at(model: nn.Module, x: Tensor) -> None:
    """`grad_at` at every block."""
    with torch.enable_grad():
        grad_at(model, BLOCKS, metric)(x)


# --- entering alone, and starting alone ---


def enter_leave(context: Context) -> None:
    """No call in between; whoever measures silences the warning about that (law 7)."""
    with context():
        pass


@contextmanager
def not_called() -> Iterator[None]:
    """Without the warning that a context was left in which the model never ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotCalledWarning)
        yield


def command(*arguments: str) -> Work:
    """A new Python."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
