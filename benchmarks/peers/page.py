"""The page of what was measured: README.md beside this file."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import jobs

TITLES = {"hooks": "raw hooks", "interp_engine": "interp-engine", "transformer_lens": "TransformerLens"}

HEAD = """# Beside peers

What the same jobs cost with nicehooks, with PyTorch's own hooks and with other libraries. `make bench-peers` makes
the environments, measures, and writes this page.

The model is a GPT-2 with 12 layers of width 64, 4 heads and 1000 tokens, random weights, batch 1, 16 positions; it is
saved once, and each peer loads it. It is small, so that what the libraries do is seen beside what the model does: on
a large model every ratio here goes towards 1.

Each peer runs in a process and an environment of its own, from a locked file in `locks/`. Its answer to each job is
compared with that of raw hooks on an untouched copy (to 1e-4 of the largest number) before it is timed. A figure is
the time over that of a bare call, without gradients, of an untouched copy of the model in the same process; the two
take turns in random order, and the figure is the median over the rounds. The clock is the processor time of the
process, so that waiting for other programs does not count. The collector of garbage is off while it runs. What a peer
makes once for a model, such as a wrapper, is off the clock; what stands around each use is on it. Where there are
several ways to do a job, all are measured and the quickest counts. The code is in the files `with_….py`, one for each
peer: tell us where another way is quicker.
"""


WHY = """Where nicehooks is not the quickest: raw hooks cost less in each row but the sweep, and interp-engine, a thin
layer over them, at one place and for gradients. A context here reads a path, looks whether the model is still what it
was, acts in its own thread alone, and sees on leaving whether each place was reached. `grad_at` also walks the graph
once, to find what lies outside of the forward. [Benchmarks](../README.md) has where the time goes. torchlens logs
every operation with its metadata, so its figures are those of a larger job.
"""


def page(found: list[dict[str, Any]], machine: str) -> str:
    """All of it, as Markdown."""
    date = datetime.date.today().isoformat()
    return "\n".join(
        [
            HEAD,
            f"Measured on {date}: {machine}; Python {found[0]['python']}.\n",
            "## The time, over a bare call\n",
            *_table(["", *jobs.JOBS], ([title(peer), *_cells(peer)] for peer in found)),
            "",
            *(f"- **{job}**: {what}." for job, what in jobs.JOBS.items()),
            "",
            WHY,
            "## Around it\n",
            *_table(AROUND, map(_around, found)),
            "",
            *(f"- **{name}**: {what}." for name, what in zip(AROUND[1:], AROUND_WORDS, strict=True)),
            "",
            "## How each was done\n",
            *_table(["", "job", "by", "× bare", "quartiles", "off by"], _ways(found)),
            "",
            "## What is not there\n",
            *_lacks(found),
            "",
            "## Versions\n",
            *(f"- {title(peer)}: {', '.join(map(' '.join, peer['versions'].items()))}" for peer in found),
            "",
        ]
    )


AROUND = ["", "import", "idle", "changed", "bystander", "memory, import", "memory, use"]
AROUND_WORDS = (
    "seconds that importing it adds, in a new process which has torch and the model's code already; the median of five",
    "a call of the model that the peer was given, when all is done and left, over a bare call of an untouched copy",
    "how many of the modules of that model then have another class, other attributes or hooks than before, or are gone",
    "a bare call of the untouched copy when all is done, over one before the peer was imported: above 1 where "
    "torch itself was changed; within a tenth or so it is noise",
    "MB that importing it adds to the peak of the process",
    "MB that doing each job in each way once adds to that",
)


def title(peer: dict[str, Any]) -> str:
    """What a peer is called on the page."""
    name = str(peer["name"])
    return TITLES.get(name, name)


def best(peer: dict[str, Any], job: str) -> dict[str, Any] | None:
    """The quickest of the ways of a job that give the answer."""
    records = [record for record in peer["records"] if record["job"] == job and "median" in record]
    return min(records, key=lambda record: record["median"]) if records else None


def _cells(peer: dict[str, Any]) -> Iterator[str]:
    for job in jobs.JOBS:
        record = best(peer, job)
        more = f" ({record['values']} values)" if record and "values" in record else ""
        yield f"{record['median']:.3g}{more}" if record else "–"


def _around(peer: dict[str, Any]) -> list[str]:
    memory = peer["memory"]
    idle = f"{peer['idle']['median']:.2f}" if peer["idle"] else "–"
    return [
        title(peer),
        f"{peer['import']['median']:.2f} s" if peer["import"] else "–",
        idle,
        f"{peer['changed']} of {peer['modules']}",
        f"{peer['bystander']:.2f}",
        f"{memory['imported']:.0f}",
        f"{memory['used']:.0f}",
    ]


def _ways(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for peer in found:
        for record in peer["records"]:
            if "median" in record:
                low, high = record["quartiles"]
                figures = [f"{record['median']:.3g}", f"{low:.3g}…{high:.3g}", f"{record['off']:.0e}"]
                yield [title(peer), record["job"], f"`{record['how']}`", *figures]


def _lacks(found: list[dict[str, Any]]) -> Iterator[str]:
    for peer in found:
        for record in peer["records"]:
            where = f"- {title(peer)}, {record['job']}, by `{record['how']}`: "
            if "raised" in record:
                yield f"{where}`{record['raised']}`"
            elif "median" not in record:
                yield f"{where}the answer is another, off by {record['off']:.1g}."
        for job, why in peer["lacks"].items():
            yield f"- {title(peer)}, {job}: {why}."


def _table(head: list[str], rows: Any) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]
