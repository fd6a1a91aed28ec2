"""Models that are spread over two and four processes: what contexts do to them is what they do to the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spread_checks as checks
import spread_surroundings as around
from process_groups import DONE, Check, results_of
from torch import nn

from nicehooks import capture

FIRST: list[Check] = [checks.columns, checks.embedding, checks.fully_sharded, around.layouts, around.misfits]
"""Those that say soonest that something is wrong."""

MORE: list[Check] = [
    checks.rows,
    checks.more_columns,
    checks.sequence,
    checks.weights,
    checks.more_weights,
    checks.fully_sharded_values,
    checks.fully_sharded_gpt2,
    checks.two_dimensions,
    checks.offloaded,
    checks.shards_of_columns,
    checks.short_dtypes,
    checks.entered_before,
    around.options,
    around.whole_caches,
    around.local_values,
    around.one_rank_alone,
    around.nested,
    around.mapped,
    around.raising,
    around.transformers_plan,
    around.pipeline,
    around.data_parallel,
]

OF_FOUR: list[Check] = [
    checks.columns,
    checks.two_dimensions,
    around.local_values,
    around.one_rank_alone,
    around.pipeline,
]
"""Those that are other with four than with two: shards of different sizes, two dimensions, more than one neighbour."""


def named(some: list[Check]) -> dict[str, Check]:
    return {check.__name__: check for check in some}


@pytest.mark.parametrize(
    ("processes", "some"),
    [
        pytest.param(2, FIRST, id="two"),
        pytest.param(2, MORE, id="two, more", marks=pytest.mark.slow),
        pytest.param(4, OF_FOUR, id="four", marks=pytest.mark.slow),
    ],
)
def test_a_spread_model_does_what_the_whole_one_does(processes: int, some: list[Check], tmp_path: Path) -> None:
    results = results_of(named(some), processes, tmp_path)
    assert results == dict.fromkeys(results, DONE), "\n".join(results.values())
    assert len(results) == len(some)


@pytest.mark.slow
@pytest.mark.parametrize("check", [around.raising_before_a_gather, around.raising_before_a_message_of_the_model])
def test_a_rank_that_raises_leaves_no_other_waiting_for_good(check: Check, tmp_path: Path) -> None:
    assert results_of(named([check]), 2, tmp_path, patience=3.0) == {check.__name__: DONE}


@pytest.mark.parametrize("layout", ["whole", "Full", None, True])
def test_a_layout_is_one_of_two_words(layout: Any) -> None:
    with pytest.raises(ValueError, match=f"^layout={layout!r}: it is 'local' or 'full'$"):
        capture(nn.Linear(2, 2), layout=layout)
