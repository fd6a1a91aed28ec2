"""PEFT and torchao in models that are spread over processes: contexts do what they do to the whole model."""

from __future__ import annotations

from pathlib import Path

import spread_adapters as checks
from process_groups import DONE, results_of

CHECKS = [
    checks.sharded_adapters,
    checks.adapters_beside_parallel_layers,
    checks.adapters_side_by_side,
    checks.quantised_side_by_side,
    checks.quantised_and_sharded,
]


def test_adapters_and_quantised_weights_in_two_processes(tmp_path: Path) -> None:
    results = results_of({check.__name__: check for check in CHECKS}, 2, tmp_path)
    assert results == dict.fromkeys(results, DONE), "\n".join(results.values())
