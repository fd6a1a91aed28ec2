"""Which parts `anatomy` finds, and checks, in every architecture of the installed `transformers`: a table.

    python benchmarks/anatomy_coverage.py [--markdown] [causal] [masked] [seq2seq] [vision] [pictures] [NAME …]

Each model is tiny, and random. A part counts where it was found in every layer that should have it, and has passed the
check by numbers; see docs/anatomy.md. Of models that read pictures and tokens, the language model is counted, and the
vision tower for itself.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from gallery.every_architecture import architectures, tiny  # pyright: ignore[reportMissingImports]

from nicehooks import NiceHooksError, anatomy
from nicehooks.anatomies.anatomy import Anatomy, EncoderDecoder
from nicehooks.anatomies.tables import Lacks

MAPPINGS = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "vision": ("IMAGE_CLASSIFICATION",),
    "pictures": ("IMAGE_TEXT_TO_TEXT",),
}
BRANCHES = ("attn_out", "mixer_out", "mlp_out", "cross_attn_out")
HEADS = ("q", "k", "v", "z", "pattern")


class Row(NamedTuple):
    """What was found in one architecture.

    Attributes:
        name: the class of the model.
        built: whether a tiny one could be made, and run.
        stream: whether the stream and what its branches add to it are there, and checked.
        heads: whether queries, keys, values, patterns and z are.
        why: what is not there, and why not.
        tower: whether there is a vision tower beside it, whose stream is there, and checked.
        tower_heads: whether its queries, keys, values, patterns and z are.
    """

    name: str
    built: bool
    stream: bool = False
    heads: bool = False
    why: str = ""
    tower: bool = False
    tower_heads: bool = False


def row_of(name: str) -> Row:
    """What is found in the architecture called `name`."""
    try:
        model = tiny(name)
    except Exception as error:  # a config that cannot be made small like this
        return Row(name, False, why=f"no tiny one: {_short(error)}")
    try:
        found = anatomy(model)
    except NiceHooksError as error:
        return Row(name, "did not run" not in str(error), why=_short(error))
    bodies = [found.encoder, found.decoder] if isinstance(found, EncoderDecoder) else [found]
    rows = [_row(name, one) for one in bodies]
    stream, heads = all(one.stream for one in rows), all(one.heads for one in rows)
    tower = _tower(name, bodies[-1]) if name in architectures(*MAPPINGS["pictures"]) else Row(name, False)
    why = "; ".join(filter(None, (one.why for one in [*rows, tower])))
    return Row(name, True, stream, heads, why, tower.stream, tower.heads)


def _tower(name: str, found: Anatomy) -> Row:
    try:
        row = _row(name, found.vision)
    except NiceHooksError as error:
        return Row(name, False, why=f"vision: {_short(error)}")
    return row._replace(why=row.why and f"vision: {row.why}")


def _row(name: str, found: Anatomy) -> Row:
    why: list[str] = []
    for places in found.layout.layers:
        missing = [part for part in ("resid_pre", "resid_post") if part not in places.passed]
        missing += [part for part in BRANCHES if places.has(part) and part not in places.passed]
        if missing or not places.form:
            reason = places.parts.get("attn_out")
            why.append(f"stream: {reason.reason if isinstance(reason, Lacks) else ', '.join(missing)}")
    singles = [part for part in ("embed", "logits") if part != "logits" or found.layout.roles]
    for part in singles:
        place = found.layout.singles.get(part)
        if isinstance(place, Lacks) and _reads_tokens(found):
            why.append(f"{part}: {place.reason}")
    stream = not why
    with_heads = [one for one in found.layout.layers if one.has("attn_out")]
    lacking: list[str] = []
    for places in with_heads:
        for part in HEADS:
            place = places.parts.get(part)
            if isinstance(place, Lacks):
                lacking.append(f"{part}: {place.reason}")
            elif part not in places.passed:
                lacking.append(f"{part}: not checked")
    why += lacking if with_heads else ["no softmax over keys was seen: its layers mix positions otherwise"]
    return Row(name, True, stream, bool(with_heads) and not lacking, "; ".join(dict.fromkeys(why)))


def _reads_tokens(found: Anatomy) -> bool:
    return hasattr(found.config, "vocab_size") and "encoder" not in found.base.split(".")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160]


def table(rows: list[Row]) -> str:
    """The rows that lack something, and how many there are of each kind."""
    built = [row for row in rows if row.built]
    counts = Counter(stream=sum(row.stream for row in built), heads=sum(row.heads for row in built))
    towers, with_heads = sum(row.tower for row in built), sum(row.tower_heads for row in built)
    lines = [f"{len(built)} of {len(rows)} build and run; stream {counts['stream']}, heads {counts['heads']}"]
    lines[0] += f"; the stream of a vision tower {towers}, its heads {with_heads}" if towers else ""
    lines += ["", "| architecture | stream | heads | what is not there, and why |", "| --- | --- | --- | --- |"]
    for row in sorted(rows):
        if row.built and not (row.stream and row.heads):
            lines.append(f"| `{row.name}` | {_mark(row.stream)} | {_mark(row.heads)} | {row.why} |")
    return "\n".join(lines)


def _mark(there: bool) -> str:
    return "yes" if there else "–"


def main(words: list[str]) -> None:
    """Prints a table for each kind of models that `words` name; for all without."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    own = [word for word in words if word not in MAPPINGS]
    for kind in [word for word in words if word in MAPPINGS] or ([] if own else list(MAPPINGS)):
        rows = [_told(row_of(name)) for name in architectures(*MAPPINGS[kind])]
        print(f"\n## {kind}\n\n{table(rows)}", flush=True)
    for name in own:
        _told(row_of(name))


def _told(row: Row) -> Row:
    print(*row[:4], row.why[:300], file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
