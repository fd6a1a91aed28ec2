"""Streams of padded texts, and what a model computes for each text alone, by a raw hook."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gallery.prefix import PrefixModel
from torch import Tensor, nn


def texts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Texts of random tokens, each of 1 to `longest`."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(1, 100, (length,), generator=random).tolist() for length in lengths]


def stream(samples: list[list[int]], size: int = 4, side: str = "right") -> list[dict[str, Tensor]]:
    """The texts as batches, padded on one side, or (`"both"`) on either in turns."""
    batches: list[dict[str, Tensor]] = []
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        width = max(map(len, part))
        left = side == "left" or (side == "both" and first // size % 2 == 1)
        padded = [[0] * (width - len(t)) + t if left else t + [0] * (width - len(t)) for t in part]
        mask = [[int(token > 0) for token in row] for row in padded]
        batches.append({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)})
    return batches


def alone(
    model: nn.Module, samples: list[list[int]], module: str, read: Callable[[Any], Tensor] = lambda out: out
) -> list[Tensor]:
    """What `module` returns for each text alone `[position, …]`, by a raw hook."""
    found: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, args, out: found.append(read(out)[0].detach()))
    try:
        with torch.no_grad():
            for text in samples:
                model(torch.tensor([text]))
    finally:
        handle.remove()
    return found


def check_rows(rows: Any, key: str, samples: list[list[int]], wanted: list[Tensor], atol: float = 1e-5) -> None:
    """Each row is what its sample has at its position, and has its token."""
    for value, sample, position, token in zip(rows[key], rows.sample, rows.position, rows.token, strict=True):
        assert samples[sample][position] == token
        torch.testing.assert_close(value.float(), wanted[sample][position], atol=atol, rtol=atol)


def all_places(samples: list[list[int]]) -> list[tuple[int, int]]:
    """Every sample with every position in it."""
    return [(sample, position) for sample, text in enumerate(samples) for position in range(len(text))]


def places_of(rows: Any) -> list[tuple[int, int]]:
    """The sample and position of each row."""
    return list(zip(rows.sample.tolist(), rows.position.tolist(), strict=True))


# --- a process that is killed -----------------------------------------------------------------------------------------


def killed_again_and_again(store: Path, kills: int, seed: int) -> None:
    """Harvests into `store`, and kills the process at random moments until it has been killed `kills` times.

    Each process is forked from this one, which has imported everything: so a kill comes within the harvest, and not
    while Python starts. Its moment is one of the time that the process itself has computed, whatever else the machine
    does: between none and a third of what a whole harvest takes. A store that is done is put aside, and the next begun.
    """
    from nicehooks import harvest

    def run(number: int | str) -> None:
        batches = stream(texts(120, seed=3), side="both")
        harvest(PrefixModel(), ["layers.1", "layers.3"], batches, store / str(number), shard_rows=16, resume=True)

    before = time.process_time()
    run("whole")
    most = (time.process_time() - before) / 3
    random = torch.Generator().manual_seed(seed)
    number = done = 0
    while number < kills:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, max(1e-4, most * torch.rand((), generator=random).item()))
            run(done)
            os._exit(0)
        torch.rand((), generator=random)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        number += os.WIFSIGNALED(status)
        done += not os.WIFSIGNALED(status)
    run(done)
    print(number, done + 1)


if __name__ == "__main__":
    killed_again_and_again(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
