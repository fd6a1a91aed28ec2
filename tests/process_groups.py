"""Real process groups: many checks in the same few processes, as starting those takes longer than the checks."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Check = Callable[[], None]

PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
]
"""What the process imports once of which all others are forks."""

PATIENCE = 60.0
"""How many seconds a process waits for the others."""

DONE = "done"


def results_of(checks: Mapping[str, Check], processes: int, folder: Path, patience: float = PATIENCE) -> dict[str, str]:
    """What each check came to in `processes` processes: `DONE`, or the tracebacks of those in which it failed.

    Behind a check that failed nothing is run, as the processes are no longer at the same line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    workers = [
        context.Process(target=_work, args=(rank, processes, str(folder), dict(checks), patience), daemon=True)
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {name: _result(name, processes, folder) for name in checks}


def _result(name: str, processes: int, folder: Path) -> str:
    files = [folder / f"{rank}-{name}" for rank in range(processes)]
    said = [file.read_text() if file.exists() else "never run" for file in files]
    return DONE if said == [DONE] * processes else "\n".join(said)


def _work(rank: int, processes: int, folder: str, checks: dict[str, Check], patience: float) -> None:
    torch.set_num_threads(1)
    meeting, timeout = f"file://{folder}/meeting", datetime.timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=timeout)
    for name, check in checks.items():
        try:
            check()
            if patience == PATIENCE:  # else it is about processes that do not come
                dist.barrier()
        except BaseException:
            (Path(folder) / f"{rank}-{name}").write_text(f"--- rank {rank} ---\n{traceback.format_exc()}")
            raise
        (Path(folder) / f"{rank}-{name}").write_text(DONE)
    dist.destroy_process_group()


def near(a: Any, b: Any, atol: float = 1e-5) -> bool:
    """Whether two tensors are equal but for rounding; of one that is spread, the whole is compared."""
    a, b = (value.full_tensor() if hasattr(value, "full_tensor") else value for value in (a, b))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    largest = max(1.0, b.abs().max().item()) if b.numel() else 1.0  # sums that cancel are rounded as their terms are
    return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=1e-4, atol=atol * largest)
