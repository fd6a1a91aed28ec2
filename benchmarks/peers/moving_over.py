"""The rows of the pages for who moves over, run with the other library and compared with what nicehooks gives.

    python benchmarks/peers/moving_over.py ours OUT.pt        # in the environment of this checkout
    python benchmarks/peers/moving_over.py nnsight OUT.pt     # in the peer's: compares, and exits with 1 if one differs

`make test-peers` calls it. The rows of a page are in `moved_from_….py`, once with each library, by their first cells.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Callable[[], Any]]
PAGES = ("nnsight", "pyvene", "transformer_lens")
DOCS = Path(__file__).parent.parent.parent / "docs"
SAME, OTHER = "same", "other"


def shown(same: Any, other: Any) -> dict[str, Any]:
    """What a row gives that says in what it is different on purpose: `other` is to be another with each library."""
    return {SAME: same, OTHER: other}


def gpt2() -> tuple[Any, Tensor, Tensor]:
    """The model and the two inputs of the pages; the same in every environment."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids, other = torch.randint(1000, (2, 1, 6))
    return model, ids, other


def generating(ids: Tensor) -> dict[str, Any]:
    """Options for three new tokens."""
    return {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}


def tokenizer() -> Any:
    """For a library that will not do without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "w", "eos_token": "w", "bos_token": "w", "unk_token": "w"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"w": 0}, unk_token="w")), **special)


def loss_of(logits: Tensor) -> Tensor:
    """A number to go backward from."""
    return logits[0, -1, 7]


def error_of(fn: Callable[[], Any]) -> str:
    """The name of the error that it raises, or "none"."""
    try:
        fn()
    except Exception as error:
        return type(error).__name__
    return "none"


def pickles(thing: Any) -> bool:
    """Whether it can be pickled as it is."""
    import pickle

    return error_of(lambda: pickle.dumps(thing)) == "none"


def names_run(model: Any, call: Callable[[], Any]) -> list[str]:
    """The modules that ran in a call, in order."""
    ran: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: ran.append(name)

    handles = [module.register_forward_hook(noting(name)) for name, module in model.named_modules()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return ran


def plain(value: Any) -> Any:
    """Without what the file would need of this library, and without graphs."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def apart(expected: Any, found: Any) -> float:
    """The largest difference of two values, or of those in two lists or dicts; infinite where shapes differ."""
    if isinstance(expected, Tensor):
        return float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if isinstance(expected, dict) and expected.keys() == found.keys():
        return apart(list(expected.values()), [found[key] for key in expected])
    if isinstance(expected, list):
        if len(expected) != len(found):
            return float("inf")
        return max((apart(*pair) for pair in zip(expected, found, strict=True)), default=0.0)
    return 0.0 if expected == found else float("inf")


def verdict(expected: Any, found: Any) -> tuple[str, bool]:
    """How what both gave compares, and whether it is as the page has it."""
    off = apart(expected[SAME], found[SAME])
    if off >= 1e-5:
        return f"another, off by {off:.1g}", False
    if expected[OTHER] is None and found[OTHER] is None:
        return "the same", True
    if apart(expected[OTHER], found[OTHER]) < 1e-5:
        return f"the same where it is to be another, {found[OTHER]!r}", False
    return f"different on purpose, {found[OTHER]!r} there and {expected[OTHER]!r} here", True


def given(row: Callable[[], Any]) -> dict[str, Any]:
    """What a row gives, as `shown`."""
    value = row()
    return plain(value if isinstance(value, dict) and value.keys() == {SAME, OTHER} else shown(value, None))


def first_cells(page: str) -> list[str]:
    """How the rows begin, of the tables that compare."""
    text = (DOCS / f"from_{page}.md").read_text()
    tables = re.findall(r"^\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.split(r"(?<!\\)\|", line)[1].strip() for table in tables for line in table.splitlines()]


def bold(page: str) -> list[str]:
    """Headings, and how the paragraphs begin that say in what it is different."""
    return re.findall(r"^(?:\*\*|## )(.+?)(?:\*\*|\n)", (DOCS / f"from_{page}.md").read_text(), re.MULTILINE)


def compare(rows: Rows, expected: dict[str, Any]) -> bool:
    """Prints each row, and says whether all are as the page has them."""
    fine = rows.keys() == expected.keys()
    for row, theirs in rows.items():
        try:
            said, right = verdict(expected[row], given(theirs))
        except Exception as error:
            said, right = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False
        fine &= right
        print(f"{said}: {row}", flush=True)
    return fine


def rows_of(page: str) -> Any:
    """The file with the rows of a page."""
    return importlib.import_module(f"moved_from_{page}")


def main() -> None:
    name, out = sys.argv[1:]
    if name == "ours":
        torch.save({page: {row: given(fn) for row, fn in rows_of(page).ours().items()} for page in PAGES}, out)
        return
    rows = rows_of(name)
    expected = torch.load(out)[name]
    fine = compare(rows.theirs(), expected)
    cells, done = {*first_cells(name), *bold(name)}, {*expected, *rows.WITHOUT}
    missing = {cell for cell in first_cells(name) if cell not in done} | {row for row in done if row not in cells}
    for row, why in rows.WITHOUT.items():
        print(f"not run, {why}: {row}")
    for row in sorted(missing):
        print(f"not both here and on the page: {row}")
    sys.exit(0 if fine and not missing else 1)


if __name__ == "__main__":
    main()
