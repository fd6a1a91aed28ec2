"""The engine of a cluster, on a real local cluster of two workers: the same rows, also where a worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harvest_streams
import pytest
import ray
import ray.data
import torch
from gallery.prefix import PrefixModel
from harvest_streams import all_places, alone, check_rows, places_of, stream, texts
from torch import nn

import nicehooks
from nicehooks import ActivationStore, harvest
from nicehooks.errors import FileFault, SiteNotFound
from nicehooks.harvesting.manifest import StoreMismatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray: it leaves sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SAMPLES = texts(64, seed=3)
KEYS = ["layers.1", "layers.3"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    root = Path(nicehooks.__file__).parent.parent
    paths = os.pathsep.join([str(root), str(Path(harvest_streams.__file__).parent)])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, runtime_env=environment
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def with_ray(model: Any, batches: Any, store: Path, workers: int = 2, **more: Any) -> ActivationStore:
    return harvest(model, KEYS, batches, store, engine="ray", workers=workers, num_cpus=0.5, **more)


def check_store(store: ActivationStore) -> None:
    """Every token of every text once, each what its text has there."""
    store.check()
    rows = store.rows(slice(None))
    assert sorted(places_of(rows)) == all_places(SAMPLES)
    for key in KEYS:
        check_rows(rows, key, SAMPLES, alone(PrefixModel(), SAMPLES, key))


def test_batches_give_the_rows_of_one_process(tmp_path: Path) -> None:
    batches = stream(SAMPLES, side="both")
    store = with_ray(PrefixModel(), batches, tmp_path / "ray", shard_batches=3)
    check_store(store)
    here = harvest(PrefixModel(), KEYS, batches, tmp_path / "here")
    assert torch.equal(store["layers.3"][:], here["layers.3"][:])
    assert store.manifest.fingerprint == here.manifest.fingerprint
    assert len(store.manifest.shards) == 6


def test_a_dataset_of_texts_of_any_length_and_a_function_that_makes_the_model(tmp_path: Path) -> None:
    data = ray.data.from_items([{"input_ids": text} for text in SAMPLES])
    check_store(with_ray(PrefixModel, data, tmp_path, workers=1, batch_size=5, shard_batches=2))


def dying(mark: Path) -> Callable[[], nn.Module]:
    """A function that makes a model which kills its worker in the middle of the work, the first time."""
    name = str(mark)

    def make() -> nn.Module:
        model = PrefixModel()

        def die(*_: object) -> None:
            with open(name + ".calls", "a") as file:
                file.write("x")
            if os.stat(name + ".calls").st_size > 5 and not os.path.exists(name):
                with open(name, "w"):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)

        model.register_forward_pre_hook(die)
        return model

    return make


def test_the_death_of_a_worker_loses_and_doubles_nothing(tmp_path: Path) -> None:
    store = with_ray(dying(tmp_path / "died"), stream(SAMPLES, side="both"), tmp_path / "store", shard_batches=2)
    assert (tmp_path / "died").exists()
    check_store(store)


def test_resuming_leaves_out_what_is_there(tmp_path: Path) -> None:
    first = with_ray(PrefixModel(), stream(SAMPLES[:24]), tmp_path, workers=1, shard_batches=2)
    names = {shard.file for shard in first.manifest.shards}
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileFault, match="which was begun"):
        with_ray(PrefixModel(), stream(SAMPLES), tmp_path)
    store = with_ray(PrefixModel(), stream(SAMPLES), tmp_path, workers=1, resume=True, shard_batches=2)
    assert names < {shard.file for shard in store.manifest.shards}
    check_store(store)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreMismatch, match="the modules or the weights of the model differs"):
        with_ray(PrefixModel(seed=1), stream(texts(80, seed=3)), tmp_path, workers=1, resume=True)


def test_an_error_of_a_worker_is_raised_as_itself(tmp_path: Path) -> None:
    with pytest.raises(SiteNotFound, match=r"no module matches 'layer.1'"):
        harvest(PrefixModel(), "layer.1", stream(SAMPLES), tmp_path, engine="ray", workers=1, num_cpus=0.5)
