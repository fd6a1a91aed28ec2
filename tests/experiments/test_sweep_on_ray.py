"""A sweep spread over a real local Ray cluster of two workers: the grid of one process, also where a worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from bodies import body
from gallery.architectures import VOCABULARY
from gallery.swept import CountsRuns, Looped, MeanOfBatch
from torch import Tensor, nn

import nicehooks
from nicehooks import Effects, NiceHooksError, TreeMismatch, ablate, capture, sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray: it leaves sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WHERE = "transformer.h.*[:, *]"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, [Path(nicehooks.__file__).parent.parent, tests.parent, tests]))
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, runtime_env=environment
    )
    yield
    ray.shutdown()


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, 5]


def first(output: Tensor) -> Tensor:
    return output[:, 0]


def prompts(seed: int, count: int = 3) -> Tensor:
    """So many that they are cut is four and more."""
    return torch.randint(3, VOCABULARY, (count, 5), generator=torch.Generator().manual_seed(seed))


def clean(model: nn.Module, count: int = 3) -> Any:
    with torch.no_grad(), capture(model, "transformer.h.*") as acts:
        model(prompts(1, count))
    return acts


def alike(found: Effects, expected: Effects) -> None:
    assert found.axes == expected.axes and found.sites == expected.sites
    assert torch.allclose(found.values, expected.values, atol=1e-5)
    assert found.examples is not None and expected.examples is not None
    assert torch.allclose(found.examples, expected.examples, atol=1e-5)


@pytest.mark.parametrize("values", ["resample", [0.0, lambda value: 2 * value]], ids=["resample", "alternatives"])
def test_it_is_the_grid_of_one_process(values: Any) -> None:
    model = body("gpt2")
    told: list[tuple[int, int]] = []
    found = sweep(
        model, WHERE, values, metric, prompts(0), engine="ray", progress=lambda done, count: told.append((done, count))
    )
    expected = sweep(model, WHERE, values, metric, prompts(0))
    alike(found, expected)
    count = expected.values.numel()
    assert told[-1] == (count, count) and [done for done, _ in told] == sorted({done for done, _ in told})


def killing(mark: Path) -> Callable[[Any], Tensor]:
    """A metric that kills the process of a worker once, in the middle of its work."""
    here, name = os.getpid(), str(mark)

    def counting(output: Any) -> Tensor:
        calls.append(1)
        if os.getpid() != here and len(calls) == 4 and not os.path.exists(name):
            open(name, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return output.logits[:, -1, 5]

    calls: list[int] = []
    return counting


def test_the_part_of_a_worker_that_dies_is_done_by_another_one(tmp_path: Path) -> None:
    model = body("gpt2")
    found = sweep(model, WHERE, clean(model), killing(tmp_path / "killed"), prompts(0), engine="ray", chunk_size=1)
    assert (tmp_path / "killed").exists()
    alike(found, sweep(model, WHERE, clean(model), metric, prompts(0)))


def noting(folder: Path) -> Callable[[Any], Tensor]:
    """A metric that leaves a file for each process, named after it and after how many prompts there were at least."""
    name, here = str(folder), os.getpid()

    def metric_of(output: Any) -> Tensor:
        if os.getpid() != here:
            open(os.path.join(name, f"{os.getpid()}-{len(output.logits)}"), "w").close()
        return output.logits[:, -1, 5]

    return metric_of


def test_one_cell_over_many_prompts_keeps_all_workers_busy(tmp_path: Path) -> None:
    model, where = body("gpt2"), "transformer.h.1[:, 2]"
    found = sweep(
        model, where, clean(model, 41), noting(tmp_path), prompts(0, 41), engine="ray", check=False, chunk_size=1
    )
    alike(found, sweep(model, where, clean(model, 41), metric, prompts(0, 41)))
    processes, counts = zip(*[path.name.split("-") for path in tmp_path.iterdir()], strict=True)
    assert len(set(processes)) == 2 and set(counts) == {"10", "11"} and not found.notes


def test_a_worker_that_dies_and_an_interrupt_amid_parts_of_the_prompts(tmp_path: Path) -> None:
    model, values, ids = body("gpt2"), clean(body("gpt2"), 9), prompts(0, 9)
    expected = sweep(model, WHERE, values, metric, ids)

    def interrupt(done: int, count: int) -> None:
        raise KeyboardInterrupt

    lethal = killing(tmp_path / "killed")
    part = sweep(model, WHERE, values, lethal, ids, engine="ray", chunk_size=1, progress=interrupt)
    assert (tmp_path / "killed").exists() and "interrupted" in part.notes[-1]
    assert part.examples is not None and int(part.examples.isnan().sum()) in (7 * 9, 8 * 9)  # every other cell is there
    alike(sweep(model, WHERE, values, metric, ids, engine="ray", resume=part), expected)
    alike(sweep(model, WHERE, values, metric, ids, engine="ray", resume=expected), expected)


def test_prompts_that_depend_on_each_other_go_to_every_worker() -> None:
    model, x = MeanOfBatch().eval(), torch.randn(8, 4)
    found = sweep(model, "a[:, *]", 0.0, first, x, engine="ray")
    alike(found, sweep(model, "a[:, *]", 0.0, first, x))
    assert found.notes[0].startswith("every worker had all prompts: resume=…")


def test_what_goes_wrong_in_a_worker_is_the_error_of_one_process() -> None:
    model, x = Looped().eval(), torch.randn(3, 4)
    with pytest.raises(TreeMismatch, match=r"at 'block\.1'"):
        sweep(
            model,
            ["block.0", "block.1"],
            {"block.0": 0.0, "block.1": torch.ones(7)},
            lambda y: y[:, 0],
            x,
            engine="ray",
        )
    with pytest.raises(NiceHooksError):
        sweep(CountsRuns().eval(), "a[:, *]", 0.0, first, x, engine="ray")


def test_interventions_that_would_not_go_along_are_refused() -> None:
    model, x = Looped().eval(), torch.randn(3, 4)
    with (
        pytest.raises(NiceHooksError, match=r"ablate\(model, 'head', …\) acts on the model here"),
        ablate(model, "head"),
    ):
        sweep(model, "block", 0.0, first, x, engine="ray")
