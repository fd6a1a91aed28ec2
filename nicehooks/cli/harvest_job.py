"""`nicehooks harvest`: the activations of a text of the user's own, in files."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nicehooks.anatomies.residual import decoder_blocks
from nicehooks.cli import terminal
from nicehooks.cli.loading import load
from nicehooks.errors import NiceHooksError
from nicehooks.harvesting.harvester import harvest
from nicehooks.harvesting.rows import Recipe
from nicehooks.harvesting.starting import format_of_first


class HarvestError(NiceHooksError):
    """There is nothing to read, or no room for what would be written."""


def harvest_job(options: argparse.Namespace) -> None:
    """`nicehooks harvest`: says what it will take, then runs."""
    terminal.check()
    text = _text_of(options.text)
    model, tokenizer = load(options.model, options.device)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
    if not ids:
        raise HarvestError(f"{options.text!r} has no tokens.")
    blocks = decoder_blocks(model)
    where = options.where or [blocks[len(blocks) // 2]]
    dtype = getattr(torch, options.dtype)
    batches = pieces(ids, min(options.length, len(ids)), options.batch)
    found = format_of_first(Recipe(model, where, dtype=dtype), {"input_ids": batches[0]["input_ids"][:1, :2]})
    assert found is not None
    _announce(options, where, len(ids), found.row_bytes)
    started = time.perf_counter()
    with _bar(len(ids)) as progress:
        store = harvest(model, where, batches, options.out, dtype=dtype, resume=options.resume, progress=progress)
    seconds = time.perf_counter() - started
    print(f"{len(store):,} rows in {seconds:.1f} s, {len(ids) / seconds:,.0f} tokens a second. To read them:")
    print(f"  store = nicehooks.ActivationStore({options.out!r})")
    print(f"  store[{store.sites[0]!r}][:10]")


def pieces(ids: list[int], length: int, batch: int) -> list[dict[str, Tensor]]:
    """One long text as batches of pieces; what is left of the last one is padded."""
    rest = -len(ids) % length
    every = torch.tensor(ids + [0] * rest).reshape(-1, length)
    mask = torch.tensor([1] * len(ids) + [0] * rest).reshape(-1, length)
    return [
        {"input_ids": some, "attention_mask": real}
        for some, real in zip(every.split(batch), mask.split(batch), strict=True)
    ]


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # a mark at the beginning is no text
    except (OSError, UnicodeDecodeError) as error:
        raise HarvestError(f"{file!r} cannot be read: {error}") from None


def _announce(options: argparse.Namespace, where: list[str], tokens: int, row: int) -> None:
    """Says how many bytes there will be, and stops where there is no room for them."""
    print(f"{options.model}: {', '.join(where)}")
    print(f"{tokens:,} tokens × {row:,} bytes = about {_shown_size(tokens * row)} in {options.out!r}")
    if "://" in options.out or options.resume:
        return
    folder = next(parent for parent in Path(options.out).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if tokens * row > free:
        raise HarvestError(
            f"there is no room for that: {_shown_size(free)} are free. Try --dtype bfloat16, --tokens, or fewer places."
        )


def _shown_size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


@contextmanager
def _bar(tokens: int) -> Generator[Callable[[int], Any]]:
    """A progress bar on stderr, with the tokens per second."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("harvesting"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, started = bar.add_task("", total=tokens, speed=""), time.perf_counter()

        def show(done: int) -> None:
            speed = done / (time.perf_counter() - started)
            bar.update(task, completed=done, speed=f"{speed:,.0f} tokens/s")

        yield show
