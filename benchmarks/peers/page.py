"""The page of what was measured: README.md beside this file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jobs
from headlines import HEADLINES as WORDS

TITLES = {"hooks": "raw hooks", "interp_engine": "interp-engine", "transformer_lens": "TransformerLens"}

HEAD = """# Beside peers

What the same jobs cost with nicehooks, with PyTorch's own hooks and with other libraries. `make bench-peers` makes
the environments, measures, and writes this page.

The jobs are done on three models, each saved once and loaded by every peer, with batch 1. The first is small, so that
what the libraries do is seen beside what the model does: on large models the ratios go towards 1.

Each peer runs in a process and an environment of its own, from a locked file in `locks/`. Its answer to each job is
compared with that of raw hooks on an untouched copy (to 1e-4 of the largest number) before it is timed. A figure is
the time over that of a bare call, without gradients, of an untouched copy of the model in the same process; the two
take turns in random order, and the figure is the median over the rounds. The clock is the processor time of the
process, so that waiting for other programs does not count. The collector of garbage is off while it runs. What a peer
makes once for a model, such as a wrapper, is off the clock; what stands around each use is on it. Where there are
several ways to do a job, all are measured on the small model and the quickest counts; on the others it is the first
that gives the answer. The code is in the files `with_….py`, one for each peer: tell us where another way is quicker.
"""


WHY = """Where nicehooks is not the quickest: raw hooks cost less in each row but the sweep, and interp-engine, a thin
layer over them, at one place and for gradients; on the two larger models most of that is within the noise of a row. A
context here reads a path, looks whether the model is still what it was, acts in its own thread alone, and sees on
leaving whether each place was reached. `grad_at` also walks the graph once, to find what lies outside of the forward.
`attribute` reads a path for each of the 192 cells and gives a grid with axes, where the others multiply twelve tensors
by hand. [Benchmarks](../README.md) has where the time goes. torchlens logs every operation with its metadata, so its
figures are those of a larger job.
"""


def page(found: dict[str, list[dict[str, Any]]], tried: list[dict[str, Any]], machine: str) -> str:
    """All of it, as Markdown.

    Args:
        found: what was measured, of each peer on each model.
        tried: what came of the headlines, of each peer.
        machine: what it ran on.
    """
    small = found["small"]
    measured = [peer for peers in found.values() for peer in peers]
    return "\n".join(
        [
            HEAD,
            f"Measured on {dates(measured)}: {machine}; Python {small[0]['python']}.\n",
            *(line for key, peers in found.items() if peers for line in _time(jobs.MODELS[key], peers)),
            *(f"- **{job}**: {what}." for job, what in jobs.JOBS.items()),
            "",
            WHY,
            *headlines(tried),
            "## Around it\n",
            "On the small model.\n",
            *_table(AROUND, map(_around, small)),
            "",
            *(f"- **{name}**: {what}." for name, what in zip(AROUND[1:], AROUND_WORDS, strict=True)),
            "",
            "## How each was done\n",
            "On the small model.\n",
            *_table(["", "job", "by", "× bare", "quartiles", "off by"], _ways(small)),
            "",
            "## What is not there\n",
            *_lacks(small),
            *(line for key, peers in found.items() if key != "small" for line in _wrong(peers, jobs.MODELS[key].title)),
            "",
            "## Versions\n",
            *(f"- {title(peer)}: {', '.join(map(' '.join, peer['versions'].items()))}" for peer in small),
            "",
        ]
    )


def dates(found: list[dict[str, Any]]) -> str:
    """The day on which it was measured, or the first and the last."""
    return " to ".join(sorted({peer["date"] for peer in found})[:: max(1, len({peer["date"] for peer in found}) - 1)])


def _time(model: jobs.Model, peers: list[dict[str, Any]]) -> list[str]:
    bare = sorted(peer["bare"] for peer in peers)[len(peers) // 2]
    return [
        f"## {model.title}: the time, over a bare call\n",
        f"{model.what}. A bare call takes {1000 * bare:.3g} ms.\n",
        *_table(["", *jobs.JOBS], ([title(peer), *_cells(peer)] for peer in peers)),
        "",
    ]


def headlines(tried: list[dict[str, Any]]) -> list[str]:
    """What nicehooks says of itself alone, as a table."""
    if not tried:
        return []
    versions = ", ".join(
        f"{title(peer)} {list(peer['versions'].values())[2]}" for peer in tried if len(peer["versions"]) > 2
    )
    return [
        "## Compiled, transformed, in threads, in a batch\n",
        f"Tried on the small model with eager attention, on {dates(tried)}, with torch "
        f"{tried[0]['versions']['torch']}: {versions}. `headlines.py` has the trials: a vector is added to the "
        "output of one block, and the output of the next is captured.\n",
        *_table(["", *WORDS], ([title(peer), *(peer["said"][word] for word in WORDS)] for peer in tried)),
        "",
        *(f"- **{word}**: {what}." for word, what in WORDS.items()),
        "",
    ]


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


def _wrong(found: list[dict[str, Any]], where: str = "") -> Iterator[str]:
    for peer in found:
        for record in peer["records"]:
            line = f"- {title(peer)}, {record['job']}{f', {where}' if where else ''}, by `{record['how']}`: "
            if "raised" in record:
                yield f"{line}`{record['raised']}`"
            elif "median" not in record:
                by = "" if record["job"] == jobs.STEER else f", off by {record['off']:.1g}"
                yield f"{line}the answer is another{by}."


def _lacks(found: list[dict[str, Any]]) -> Iterator[str]:
    yield from _wrong(found)
    for peer in found:
        for job, why in peer["lacks"].items():
            yield f"- {title(peer)}, {job}: {why}."


def _table(head: list[str], rows: Any) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]
