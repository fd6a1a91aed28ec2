"""The command line as its users meet it: the jobs, on a small model and on the shipped one, and every refusal."""

from __future__ import annotations

import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from gallery.language import shipped
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from nicehooks import UnsupportedModule, capture, patch, sites
from nicehooks.anatomies.anatomy import anatomy
from nicehooks.anatomies.residual import decoder_blocks, residual_stream
from nicehooks.cli import command, jobs, patching_job, terminal
from nicehooks.cli.loading import load
from nicehooks.cli.patching_job import differences, patched
from nicehooks.cli.prompts import PromptPairs, encode, encode_pair, encode_pairs, without_space
from nicehooks.cli.sites_job import named_sites
from nicehooks.experiments.effects import Axis, Effects
from nicehooks.pictures import heat_map

CLEAN, CORRUPTED = "When Mary and John went, John gave to", "When Mary and John went, Mary gave to"
WORDS = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John"]


# --- the grid ---------------------------------------------------------------------------------------------------------


def with_hand_written_hooks(model: torch.nn.Module, blocks: list[torch.nn.Module], pair: PromptPairs) -> torch.Tensor:
    """The grid, as one writes it without this library."""
    clean: list[torch.Tensor] = []

    def record(_module, _args, output):
        clean.append((output[0] if isinstance(output, tuple) else output).clone())

    def replace(layer: int, position: int):
        def hook(_module, _args, output):
            new = (output[0] if isinstance(output, tuple) else output).clone()
            new[:, position] = clean[layer][:, position]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def difference(inputs: dict[str, torch.Tensor]) -> float:
        logits = model(**inputs).logits[0, -1].double()
        return (logits[pair.answer] - logits[pair.wrong]).item()

    with torch.no_grad():
        handles = [block.register_forward_hook(record) for block in blocks]
        top = difference(pair.clean)
        for handle in handles:
            handle.remove()
        floor = difference(pair.corrupted)
        grid = torch.zeros(len(blocks), len(pair.tokens), dtype=torch.double)
        for layer, block in enumerate(blocks):
            for position in range(len(pair.tokens)):
                handle = block.register_forward_hook(replace(layer, position))
                grid[layer, position] = (difference(pair.corrupted) - floor) / (top - floor)
                handle.remove()
    return grid


MODELS = {
    "blocks return tensors": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    ),
    "blocks return tuples": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            num_layers=3,
            hidden_size=16,
            num_heads=2,
            vocab_size=20,
            attention_types=[[["global"], 3]],
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_grid_is_that_of_hand_written_hooks(make):
    torch.manual_seed(0)
    model = make().eval()
    clean, corrupted = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 6, 4, 5]])
    answers = torch.tensor([7]), torch.tensor([8])
    pair = PromptPairs({"input_ids": clean}, {"input_ids": corrupted}, *answers, list("abcde"))
    expected = with_hand_written_hooks(model, list(model.transformer.h), pair)
    # A batch may round otherwise, each logit in some of its last bits, and the division makes that larger.
    rounding = 8 * torch.finfo(torch.float32).eps * model(clean).logits.abs().max().item()
    top, floor = differences(model, pair)
    close = partial(torch.testing.assert_close, rtol=0, atol=rounding / abs(top - floor).item())
    for engine in ("loop", "auto"):
        effects = patched(model, pair, engine=engine)
        close(effects.values, expected)
    close(effects.values[-1, -1].item(), 1.0)  # the last block at the last position is all that logits see
    assert effects.axes[1] == ("position", ("0 a", "1 b", "2 c", "3 d", "4 e"))
    part = patched(model, pair, layers=[-1, 0], positions=[2, -1])
    assert [cell.labels for cell in part.cells()] == [("2", "2 c"), ("2", "4 e"), ("0", "2 c"), ("0", "4 e")]
    close(part.values, expected[[2, 0]][:, [2, 4]])


def test_the_largest_module_list_holds_the_blocks():
    expert = torch.nn.ModuleList([torch.nn.Linear(4, 4)] * 2)
    model = torch.nn.ModuleDict(
        {
            "small": torch.nn.ModuleList([torch.nn.Linear(2, 2)]),
            "layers": torch.nn.ModuleList([torch.nn.ModuleDict({"experts": expert})]),
        }
    )
    assert decoder_blocks(model) == ["layers.0"]
    with pytest.raises(UnsupportedModule, match=r"^Linear has no ModuleList of decoder blocks\.$"):
        decoder_blocks(torch.nn.Linear(2, 2))


def test_the_residual_stream_is_that_of_the_anatomy_where_a_table_knows_the_model():
    model, ids = (
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10)).eval(),
        {"input_ids": torch.tensor([[1, 2, 3]])},
    )
    _, stream = residual_stream(model, ids)
    assert list(stream) == [str(path) for path in anatomy(model).resid_post]
    bert = BertForMaskedLM(BertConfig(**BERT)).eval()
    _, stream = residual_stream(bert, ids)
    assert list(stream) == [f"bert.encoder.layer.{layer}.output.LayerNorm@input[0]" for layer in (0, 1)]


BERT = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 10}


def test_the_residual_stream_of_an_unknown_model_is_what_its_blocks_return():
    class Block(torch.nn.Linear):
        def forward(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
            return (super().forward(x), None)

    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(2, 2), Block(2, 2)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)[0]
            return x

    output, stream = residual_stream(Unknown(), {"x": torch.ones(1, 2)})
    assert list(stream) == ["blocks.0[0]", "blocks.1[0]"]
    assert torch.equal(stream["blocks.1[0]"], output)


def findings(*rows: list[float], second: str = "position") -> str:
    columns = ("0 When", "9 John/Mary", "13 to") if second == "position" else tuple("012")
    axes = [Axis("layer", tuple(map(str, range(len(rows))))), Axis(second, columns[: len(rows[0])])]
    return patching_job.findings(Effects(torch.tensor(rows), axes, torch.tensor(0.0)))


def test_findings_where_the_effect_moves():
    assert findings([0.0, 1.0, 0.0], [0.0, 0.97, 0.1], [0.0, 0.5, 0.5], [0.0, 0.2, 0.8]) == (
        "From layer 0 to layer 2, the effect is largest at position 9 (John/Mary): one patch restores up to 100%. "
        "At layer 3, the effect is largest at position 13 (to): one patch restores up to 80%."
    )


def test_findings_where_the_effect_stays():
    assert findings([0.02, 1.0, 0.0], [0.0, 0.97, 0.05]) == (
        "From layer 0 to layer 1, the effect is largest at position 9 (John/Mary): one patch restores up to 100%. "
        "No other position restores more than 5%."
    )


def test_findings_where_there_is_none():
    assert findings([0.02, 0.0, 0.0], [0.03, 0.04, 0.05]) == (
        "The largest effect of a single patch is 5%, at layer 1, position 13 to. "
        "All positions together add up to at most 12%, at layer 1."
    )


def test_findings_of_a_single_position():
    assert findings([0.5]) == (
        "At layer 0, the effect is largest at position 0 (When): one patch restores up to 50%. "
        "No other position restores anything, as none was tried."
    )


def test_findings_of_heads_and_of_one_axis():
    assert findings([0.5, 0.25], second="head") == (
        "At layer 0, the effect is largest at head 0: one patch restores up to 50%. "
        "No other head restores more than 25%."
    )
    alone = Effects(torch.tensor([0.1, 0.5]), [Axis("layer", ("3", "4"))], torch.tensor(0.0))
    assert patching_job.findings(alone) == "The largest effect of a single patch is 50%, at layer 4."


def test_a_token_at_the_start_is_part_of_the_prompts_and_not_of_the_answers(tiny: str):
    _, tokenizer = load(tiny)
    start = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.backend_tokenizer.post_processor = start
    pair = encode_pair(tokenizer, "When Mary", "When John", " Mary", " John")
    assert pair.clean["input_ids"].tolist() == [[0, 1, 2]]
    assert pair.corrupted["input_ids"].tolist() == [[0, 1, 3]]
    assert pair.tokens == ["<unk>", "When", "Mary/John"]
    assert (pair.answer.tolist(), pair.wrong.tolist()) == ([2], [3])


# --- the jobs ---------------------------------------------------------------------------------------------------------


def test_patch_prints_the_grid_and_draws_it(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["patch", "--model", tiny, *WORDS]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = load(tiny)
    pair = encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John")
    grid, (clean, corrupted) = patched(model, pair), differences(model, pair)
    assert f"{clean:+6.2f}  clean      {CLEAN!r}" in out
    assert f"{corrupted:+6.2f}  corrupted  {CORRUPTED!r}" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert rows[-2:] == [[str(layer), *(f"{100 * e + 0:.0f}" for e in row)] for layer, row in enumerate(percent(grid))]
    assert patching_job.findings(grid) in out
    assert out.endswith("\nThe heat map is in grid.png\n")
    assert (here / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "patching" in err  # the progress bar


def percent(grid: Effects) -> list[list[float]]:
    """The effects, with 0 for what rounds to -0."""
    return [[0.0 if abs(effect) < 0.005 else effect for effect in row] for row in grid.values.tolist()]


def test_patch_takes_some_layers_and_positions(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        command.main(["patch", "--model", tiny, *WORDS, "--layers", "1", "--positions=0,6..7,-1", "--out", "a.pdf"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[header - 1].split() == ["0", "6", "7", "8"]
    assert lines[header].split() == ["layer", "When", "John/Mary", "gave", "to"]
    assert (here / "a.pdf").read_bytes().startswith(b"%PDF")


def test_patch_writes_a_page_and_a_table(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", "a.html", "a.csv"]
    assert command.main(["patch", "--model", tiny, *WORDS, "--layers", "1", "--positions", "0,6", *out]) == 0
    assert capsys.readouterr().out.endswith("\n\nThe page is in a.html\n\nThe table is in a.csv\n")
    model, tokenizer = load(tiny)
    grid = patched(model, encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John"), "resid", [1], [0, 6])
    head, *rows = [line.split(",") for line in (here / "a.csv").read_text().splitlines()]
    assert head == ["layer", "position", "effect", "site"]
    assert [row[1] for row in rows] == ["0 When", "6 John/Mary"]
    assert [float(row[2]) for row in rows] == grid.values.flatten().tolist()
    assert (here / "a.csv").read_text().endswith('"transformer.h.1[:, 6]"\n')
    assert '"labels":["0 When","6 John/Mary"]' in (here / "a.html").read_text()


PAIRS_FILE = """\
clean,corrupted,answer,wrong
"When Mary and John went, John gave to","When Mary and John went, Mary gave to"," Mary"," John"
"When John and Mary went, Mary gave to","When John and Mary went, John gave to"," John"," Mary"
"""


def test_patch_takes_pairs_from_a_file_and_any_part(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "pairs.csv").write_text(PAIRS_FILE)
    pairs = ["--prompts", "pairs.csv", "--out", "grid.csv"]
    assert command.main(["patch", "--model", tiny, *pairs, "--sites", "z"]) == 0
    assert "mean logit difference of 2 pairs of prompts: " in capsys.readouterr().out
    rows = [line.split(",") for line in (here / "grid.csv").read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    model, tokenizer = load(tiny)
    both = encode_pairs(tokenizer, list(csv.DictReader(PAIRS_FILE.splitlines())))
    clean, corrupted = differences(model, both)
    parts = anatomy(model)
    with torch.no_grad(), capture(model, parts.z) as acts:
        model(**both.clean)
    for row, head in zip(rows, [parts.z[layer].head(head) for layer in (0, 1) for head in (0, 1)], strict=True):
        with torch.no_grad(), patch(model, {head: acts[head]}):
            by_hand = both.logit_difference(model(**both.corrupted)).mean()
        assert float(row[2]) == pytest.approx(((by_hand - corrupted) / (clean - corrupted)).item(), abs=1e-2)


def test_files_of_pairs_that_cannot_be_used(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    def refused(text: str) -> str:
        (here / "pairs.csv").write_text(text)
        return refusal(capsys, "patch", "--model", tiny, "--prompts", "pairs.csv")

    needs = "needs a first line 'clean,corrupted,answer,wrong', and a line with all four for each pair."
    assert refused("clean,wrong\na,b\n") == refused("") == f"nicehooks: 'pairs.csv' {needs}\n"
    longer = '"When Mary and John went to, John gave to","When Mary and John went to, Mary gave to"," Mary"," John"\n'
    assert refused(PAIRS_FILE + longer).startswith(
        "nicehooks: all pairs need as many tokens, but these have 9 and 10.\n"
    )
    (here / "pairs.csv").unlink()
    gone = "nicehooks: cannot read the prompts in 'pairs.csv': No such file or directory.\n"
    assert refusal(capsys, "patch", "--model", tiny, "--prompts", "pairs.csv") == gone


def test_patch_without_prompts(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["patch", "--clean", "When"])
    assert "patch needs --corrupted, --answer, --wrong; or --prompts FILE" in capsys.readouterr().err


def test_what_makes_a_result_doubtful_is_said(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    """With the answers exchanged, whichever run preferred the right one prefers the wrong one."""
    said = []
    for answers in ({}, {"answer": " John", "wrong": " Mary"}):
        assert command.main(["patch", "--model", tiny, *words(**answers), "--layers", "0", "--positions", "0"]) == 0
        said.append(capsys.readouterr())
    model, tokenizer = load(tiny)
    clean, corrupted = differences(model, encode_pair(tokenizer, CLEAN, CORRUPTED, " Mary", " John"))
    prefers = "the clean run prefers the wrong answer"
    assert [prefers in one.err for one in said] == [clean <= 0, clean >= 0]
    also = "the corrupted run prefers"
    assert [also in one.err for one in said] == [corrupted >= 0, corrupted <= 0]


@pytest.mark.parametrize(
    ("prompt", "answer", "better"),
    [("gave to", "Mary", " Mary"), ("gave to ", "Mary", None), ("gave to", " Mary", None), ("gave to", ",", None)],
)
def test_an_answer_without_its_space(prompt: str, answer: str, better: str | None):
    class Tokens:
        unk_token_id = 0

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [{" Mary": 2, "Mary": 3}.get(text, 0)]

    assert without_space(Tokens(), prompt, answer) == better


def test_tokens_are_no_markup(tiny: str, here: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--clean", "When [b]x[/] $y$", "--corrupted", "When [b]x[/] John", *WORDS[4:]]
    assert command.main(["patch", "--model", tiny, *words]) == 0
    assert "\nlayer When [b]x[/] $y$/John\n" in capsys.readouterr().out


def test_sites_prints_the_tree(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["sites", "--model", tiny]) == 0
    model, tokenizer = load(tiny)
    inputs = encode(tokenizer, command.CLEAN)
    assert capsys.readouterr().out == f"{named_sites(model, [], inputs)}\n"
    assert [*named_sites(model, [], inputs)] == [*sites(model, **inputs)]


def test_sites_shows_the_names_of_parts_and_takes_them(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["sites", "transformer.h.0.**", "z", "--model", tiny]) == 0
    lines = [line.lstrip("│ ├└─").rstrip() for line in capsys.readouterr().out.splitlines()]
    projection = "c_proj  Conv1D  Tensor[1, 14, 16] float32  @weight, @bias  ·  z[{0}] = @input[0]/2"
    assert lines[:3] == ["(model)  GPT2LMHeadModel", "transformer", "h"]
    assert lines.count(projection.format(0)) == lines.count(projection.format(1)) == 1
    assert "mlp  GPT2MLP  Tensor[1, 14, 16] float32  ·  = mlp_out[0]  mlp_in[0] = @input[0]" in lines
    assert not any("mlp_out[1]" in line for line in lines)
    assert refusal(capsys, "sites", "transformer.x", "--model", tiny).startswith("nicehooks: no module matches")


def test_sites_of_a_model_without_an_anatomy():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    assert named_sites(model, ["1"], {"input": torch.ones(1, 2)}).plain() == (
        "(model)  Sequential\n  1  ReLU  Tensor[1, 2] float32"
    )


A_LINE = "import sys; from nicehooks.cli import command, jobs; jobs.sites_job = print; exit(command.main(['sites']))"


@pytest.mark.parametrize(
    "program", ["-m nicehooks.cli.command sites --model {}", f'-c "{A_LINE}"'], ids=["long", "short"]
)
def test_a_pipe_that_closes_early_is_no_error(program: str, tiny: str):
    line = f"set -o pipefail; unset PYTHONUNBUFFERED; {sys.executable} {program.format(tiny)} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (0, False, False)


# --- the shipped model ------------------------------------------------------------------------------------------------

PAIRS = [(" Mary", " John"), (" Sarah", " Tom"), (" Anna", " Peter")]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_shipped_model_knows_the_indirect_object(one: str, other: str):
    model, tokenizer = shipped()
    text = f"When{one} and{other} went to the store,{{}} gave a drink to"
    pair = encode_pair(tokenizer, text.format(other), text.format(one), one, other)
    clean, corrupted = differences(model, pair)
    assert 3.5 < clean < 8.5
    assert -8.5 < corrupted < -3.5
    grid = patched(model, pair, layers=[5, 25], positions=[4, 9, 13])
    assert torch.allclose(grid.values[0], torch.tensor([0.0, 1.0, 0.0]).double(), atol=0.05)
    assert torch.allclose(grid.values[1], torch.tensor([0.0, 0.0, 1.0]).double(), atol=0.15)


@pytest.mark.slow
def test_the_demo(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "load", lambda name, device: shipped())
    assert command.main(["demo", "--layers", "0,29", "--positions", "9,13"]) == 0
    out = capsys.readouterr().out
    assert "From layer" not in out
    assert "At layer 0, the effect is largest at position 9 (John/Mary): one patch restores up to 100%." in out
    assert "At layer 29, the effect is largest at position 13 (to): one patch restores up to 100%." in out
    assert "before: I watched the film last night and I thought it was a great movie. I loved" in out
    assert "after:  I watched the film last night and I thought it was terrible. I mean," in out
    assert (here / "grid.png").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err[err.index("nicehooks: ") :]  # behind the progress bars of transformers


def words(**changes: str) -> list[str]:
    values = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary", "wrong": " John"} | changes
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def test_prompts_of_unequal_length(tiny: str, capsys: pytest.CaptureFixture[str]):
    corrupted = "When Mary and John and Mary went, Mary gave to"
    assert refusal(capsys, "patch", "--model", tiny, *words(corrupted=corrupted)) == (
        "nicehooks: the prompts differ in length, "
        "but patching puts each position of one into the same position of the other.\n"
        "  Exchange words for words of as many tokens.\n"
        "  clean     (9 tokens): 'When' ' Mary' ' and' ' John' ' went' ',' ' John' ' gave' ' to'\n"
        "  corrupted (11 tokens): 'When' ' Mary' ' and' ' John' ' and' ' Mary' ' went' ',' ' Mary' ' gave' ' to'\n"
    )


def test_the_same_prompt_twice(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "patch", "--model", tiny, *words(clean="When Mary", corrupted="When Mary")) == (
        "nicehooks: the clean and the corrupted prompt are the same.\n"
        "  clean     (2 tokens): 'When' ' Mary'\n"
        "  corrupted (2 tokens): 'When' ' Mary'\n"
    )


def test_a_prompt_of_nothing(tiny: str, capsys: pytest.CaptureFixture[str]):
    message = "nicehooks: the prompt '' has no tokens.\n"
    assert refusal(capsys, "patch", "--model", tiny, *words(corrupted="")) == message
    assert refusal(capsys, "sites", "--model", tiny, "--prompt", "") == message


def test_an_answer_of_several_tokens(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "patch", "--model", tiny, *words(answer=" Mary gave")) == (
        "nicehooks: the answer ' Mary gave' is not one token of this model but 2.\n"
        "  answer (2 tokens): ' Mary' ' gave'\n"
    )
    assert refusal(capsys, "patch", "--model", tiny, *words(wrong=" John,")) == (
        "nicehooks: the wrong answer ' John,' is not one token of this model but 2.\n"
        "  wrong answer (2 tokens): ' John' ','\n"
    )


def test_the_same_answer_twice(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "patch", "--model", tiny, *words(wrong=" Mary")) == (
        "nicehooks: the answer and the wrong answer are the same token, ' Mary'.\n"
    )


def test_an_unknown_model(capsys: pytest.CaptureFixture[str]):
    here = "there is no such directory or .gguf file here"
    error = refusal(capsys, "patch", "--model", "no/such-model", *WORDS)
    assert error.startswith(
        f"nicehooks: cannot load 'no/such-model': {here}, and the Hugging Face Hub cannot be reached: "
    )
    assert error.count("\n") == 1
    for name in ("./model", "no-such.gguf", "a/b/c"):
        assert refusal(capsys, "sites", "--model", name) == f"nicehooks: cannot load {name!r}: {here}.\n"
    error = refusal(capsys, "sites", "--model", "no model")
    assert error == f"nicehooks: cannot load 'no model': {here}, and no such language model on the Hugging Face Hub.\n"


QUIET = """
import sys
from nicehooks.cli import command
command.main(["sites", "--model", "nothing/there"])
print("torch" in sys.modules)
assert command.main(["sites", "transformer.h.*", "--model", sys.argv[1]]) == 0
"""


def test_only_the_command_itself_writes_to_the_terminal(tiny: str):
    """A name that is none is refused before torch is loaded, and no other library shows how far it is."""
    done = subprocess.run([sys.executable, "-c", QUIET, tiny], capture_output=True, text=True, timeout=300)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("nicehooks: cannot load 'nothing/there': ")
    assert done.stdout.startswith("False\n(model)  GPT2LMHeadModel\n")


def test_a_layer_or_position_that_is_not_there(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "patch", "--model", tiny, *WORDS, "--layers", "0..2") == (
        "nicehooks: there is no layer 2: they go from 0 to 1.\n"
    )
    assert refusal(capsys, "patch", "--model", tiny, *WORDS, "--positions=-10") == (
        "nicehooks: there is no position -10: they go from 0 to 8.\n"
    )


@pytest.mark.parametrize("numbers", ["", "x", "1,", "1-2", "1...2", "3..2"])
def test_a_list_of_numbers_that_is_none(numbers: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        command.main(["demo", f"--layers={numbers}"])
    assert leaving.value.code == 2
    message = f"argument --layers: {numbers!r} is not a list of numbers such as 0,5,20..29\n"
    assert capsys.readouterr().err.endswith(message)


def test_prompts_between_which_the_model_sees_no_difference(tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch):
    model, tokenizer = load(tiny)
    torch.nn.init.zeros_(model.lm_head.weight)
    monkeypatch.setattr(jobs, "load", lambda name, device: (model, tokenizer))
    assert refusal(capsys, "patch", *WORDS) == (
        "nicehooks: both prompts have the logit difference 0.00: there is no effect to look for.\n"
    )


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tiny: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    error = refusal(capsys, "patch", "--model", tiny, *WORDS, "--out", "missing/grid.png")
    assert error == "nicehooks: cannot write 'missing/grid.png': there is no directory 'missing'.\n"
    error = refusal(capsys, "patch", "--model", tiny, *WORDS, "--out", "grid.docx")
    assert error.startswith("nicehooks: cannot write 'grid.docx': its name should end in .")
    (here / "taken.png").mkdir()
    figure = heat_map.heat_map(torch.zeros(1, 1), ["0"], ["When"])
    with pytest.raises(heat_map.PlotError, match=r"^cannot write 'taken.png': Is a directory\.$"):
        heat_map.save(figure, "taken.png")


@pytest.mark.parametrize(("package", "extra"), [("rich", "cli"), ("matplotlib", "plot"), ("transformers", "hf")])
def test_no_extra_installed(package: str, extra: str, tiny: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(capsys, "patch", "--model", tiny, *WORDS) == (
        f"nicehooks: this needs the package '{package}', which is not installed.\n"
        f'    pip install "nicehooks[{extra}]"\n'
    )


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_heat_map_has_its_labels_as_they_are():
    columns = ["0 When", "1 $y$", "2 \\n"]
    figure = heat_map.heat_map(torch.tensor([[0.5, -2.0, 1.0]]), ["3"], columns, "a $title$")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3"]
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title]
    assert not any(label.get_parse_math() for label in labels)
    assert axes.images[0].get_clim() == (-2.0, 2.0)
    figure.canvas.draw()


def test_a_wide_grid_is_printed_in_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "40")
    terminal.print_table(torch.arange(10.0)[None] / 10, ["7"], list("abcdefghij"), "layer")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["layer", "a", "b", "c", "d", "e"],
        ["7", "0", "10", "20", "30", "40"],
        ["layer", "f", "g", "h", "i", "j"],
        ["7", "50", "60", "70", "80", "90"],
    ]
