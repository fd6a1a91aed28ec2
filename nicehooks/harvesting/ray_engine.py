"""The engine of a cluster: Ray Data hands the examples to workers, each of which has the model and writes its shards.

NOTE [What travels in a cluster]
Examples go to the workers, names of files come back; activations go from the worker that computed them into the store,
and never through Ray's object store. A shard holds whole examples, and is named for them. When a worker dies, Ray gives
its examples to another one, which writes the same file again, or one of another name. The manifest, which is written
when all is done, has the files of those who came to their end: so nothing is lost, and nothing is there twice.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.errors import FileFault, NiceHooksError
from nicehooks.extras import needs
from nicehooks.harvesting.activation_store import ActivationStore
from nicehooks.harvesting.addresses import Address, address, put
from nicehooks.harvesting.inputs import Batch, batches_of
from nicehooks.harvesting.manifest import NAME, Manifest, ShardRecord, StoreMismatch
from nicehooks.harvesting.rows import Block, Recipe
from nicehooks.harvesting.shards import Body, checksum_of, head_of
from nicehooks.harvesting.starting import THERE, format_of, manifest_for
from nicehooks.harvesting.writing import ORIGIN, header_of

GIVEN, RAY = "batch", "ray-"
"""The column of a dataset with batches as they were given, and how the names of shards begin."""


def harvest_with_ray(
    recipe: Recipe,
    batches: Any,
    store: Any,
    resume: bool = False,
    progress: Callable[[int], Any] | None = None,
    *,
    workers: int = 2,
    batch_size: int = 32,
    shard_batches: int = 16,
    padding: int = 0,
    **resources: Any,
) -> ActivationStore:
    """`harvest(…, engine="ray")`.

    Args:
        recipe: what is taken from which model; in the place of the model there may be a function that makes it, which
            every worker calls once.
        batches: a Ray dataset with a row for each example (`input_ids`, of any length, and whatever else the model is
            called with), or an iterable of batches.
        store: where; an address that every worker reaches.
        resume: leaves out the examples that are in the store already.
        progress: called with the number of rows that are done.
        workers: how many there are, each with a model of its own.
        batch_size: how many examples of a dataset a worker runs at once; they are padded to the right.
        shard_batches: how many batches make one shard.
        padding: the token that pads.
        resources: what else `Dataset.map_batches` takes: `num_gpus=1`, `num_cpus=4`, …
    """
    with needs("ray"):
        import ray
        import ray.data
    there = address(store)
    if resume and NAME in there.names() and Manifest.load(there).complete:
        return ActivationStore(there)
    before = _there_already(there, resume)
    is_dataset = hasattr(batches, "map_batches")
    data = _numbered(batches) if is_dataset else ray.data.from_items(list(_given(batches)))
    data = data.map_batches(
        Worker,
        fn_constructor_args=(
            _model_for(recipe.model),
            replace(recipe, model=_Absent()),
            store,
            before,
            batch_size,
            padding,
        ),
        batch_size=batch_size * shard_batches if is_dataset else shard_batches,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )
    written = dict(before)
    for row in data.iter_rows():
        if not row["file"]:
            raise pickle.loads(bytes.fromhex(row["said"]))
        written[str(row["file"])] = json.loads(row["said"])
        if progress is not None:
            progress(sum(said["rows"] for said in written.values()))
    return _finished(there, written)


class _Absent(nn.Module):
    """Stands for the model where it does not travel with the rest."""


def _model_for(model: Any) -> Any:
    import ray

    return ray.put(model) if isinstance(model, nn.Module) else model


# --- on the worker ----------------------------------------------------------------------------------------------------


class Worker:
    """Holds the model, and makes a shard of the examples that it is given."""

    def __init__(
        self, model: Any, recipe: Recipe, store: Any, before: dict[str, Any], batch_size: int, padding: int
    ) -> None:
        if not isinstance(model, nn.Module) and not callable(model):
            import ray

            model = ray.get(model)
        model = model if isinstance(model, nn.Module) else model()
        self.recipe = replace(recipe, model=model)
        self.there = address(store)
        self.begun = next((said["manifest"] for said in before.values()), None)
        self.done = {sample for said in before.values() for sample in said["samples"]}
        self.batch_size = batch_size
        self.padding = padding
        self.manifest: Manifest | None = None

    def __call__(self, table: dict[str, Any]) -> dict[str, Any]:
        """Writes a shard; returns its name and what it says of itself, or an error of ours to be raised again."""
        try:
            return self._written(table)
        except NiceHooksError as error:
            return {"file": [""], "said": [pickle.dumps(error).hex()]}

    def _written(self, table: dict[str, Any]) -> dict[str, Any]:
        blocks = list(self.recipe.blocks(self._left(table)))
        blocks = [block for block in blocks if block.columns]
        if not blocks:
            return {"file": [], "said": []}
        rows = _together(blocks)
        samples = torch.unique(rows[ORIGIN + "sample"]).tolist()
        name = f"{RAY}{samples[0]:012}-{hashlib.sha256(str(samples).encode()).hexdigest()[:12]}.safetensors"
        count, checksum = len(rows[ORIGIN + "sample"]), checksum_of(rows)
        said = {"rows": count, "checksum": checksum, "samples": samples, "manifest": self._manifest_of(blocks[0])}
        put(self.there, name, [head_of(rows, {"said": json.dumps(said)}), *Body(rows)])
        return {"file": [name], "said": [json.dumps(said)]}

    def _manifest_of(self, block: Block) -> dict[str, Any]:
        """What the store is, as every worker has to find it."""
        if self.manifest is None:
            self.manifest = manifest_for(self.recipe, format_of(block.columns, block.origin), 1, 1)
            shown = self.manifest.to_json()
            if self.begun is not None and self.begun != shown:
                Manifest.from_json(self.begun).check_same(self.manifest, self.there.full("").rstrip("/"))
        return self.manifest.to_json()

    def _left(self, table: dict[str, Any]) -> Iterator[Batch]:
        """The batches in a part of the data, without the examples that are done."""
        given = map(pickle.loads, table[GIVEN]) if GIVEN in table else batches_of(self._padded(table))
        for batch in given:
            keep = torch.tensor([int(sample) not in self.done for sample in batch.samples])
            if keep.any():
                yield batch if keep.all() else batch.only(keep)

    def _padded(self, table: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Rows of a dataset as batches of tensors."""
        count = len(table["sample"])
        for first in range(0, count, self.batch_size):
            part = {name: values[first : first + self.batch_size] for name, values in table.items()}
            lengths = [len(text) for text in part["input_ids"]] if "input_ids" in part else []
            batch = {
                name: _stacked(values, self.padding if name == "input_ids" else 0) for name, values in part.items()
            }
            if len(set(lengths)) > 1 and "attention_mask" not in batch:
                batch["attention_mask"] = _stacked([[1] * length for length in lengths], 0)
            yield batch


def _stacked(values: Any, padding: int) -> Tensor:
    """Rows of any length as one tensor."""
    tensors = [torch.as_tensor(value) for value in values]
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


def _together(blocks: list[Block]) -> dict[str, Tensor]:
    """The rows of several batches."""
    named = [{**block.columns, **{ORIGIN + name: value for name, value in block.origin.items()}} for block in blocks]
    return {name: torch.cat([one[name].cpu() for one in named]).contiguous() for name in named[0]}


# --- on the one who asked ---------------------------------------------------------------------------------------------


def _numbered(data: Any) -> Any:
    """A dataset whose examples have numbers."""
    import ray

    if "sample" in (data.columns() or []):
        return data
    numbers = ray.data.range(data.count()).rename_columns({"id": "sample"})
    return data.zip(numbers)


def _given(batches: Iterable[Any]) -> Iterator[dict[str, bytes]]:
    """Batches as they were given, each as one item of a dataset."""
    for batch in batches_of(batches):
        yield {GIVEN: pickle.dumps(batch)}


def _there_already(there: Address, resume: bool) -> dict[str, Any]:
    """What earlier shards say of themselves; of two that have an example in common, the first."""
    names = there.names()
    shards = sorted(name for name in names if name.startswith(RAY) and name.endswith(".safetensors"))
    if not resume and (shards or NAME in names):
        raise FileFault(THERE.format(where=there.full("").rstrip("/"), state="was begun"))
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name in shards:
        said = json.loads(header_of(there, name, names[name]).metadata["said"])
        if seen.isdisjoint(said["samples"]):
            seen.update(said["samples"])
            found[name] = said
    return found


def _finished(there: Address, written: dict[str, Any]) -> ActivationStore:
    """Writes the manifest of all that was written."""
    if not written:
        raise NiceHooksError("harvest(…, engine='ray'): there were no rows to write.")
    each = sorted(written, key=lambda name: written[name]["samples"][0])
    manifests = [written[name]["manifest"] for name in each]
    for other in manifests:
        if other != manifests[0]:
            raise StoreMismatch(
                "the workers had different models: a function that makes a model has to make one and the same."
            )
    shards = [ShardRecord(name, written[name]["rows"], written[name]["checksum"]) for name in each]
    manifest = Manifest.from_json(manifests[0])
    replace(manifest, shard_rows=max(shard.rows for shard in shards)).finished(shards, 0, []).save(there)
    for name in there.names():
        if name.startswith(RAY) and name not in written:
            there.remove(name)  # of a worker that died
    return ActivationStore(there)
