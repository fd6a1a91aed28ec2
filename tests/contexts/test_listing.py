"""`sites`: what there is to see in a model; and `describe`: what is active on it now."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

import pytest
import torch
from gallery.listed import Mixing, Model
from gallery.methods import AsksItself
from torch import Tensor, nn

from nicehooks import ablate, capture, describe, edit, fused_attention_as_steps, patch, select, sites, steer, suspend
from nicehooks.values.trees import structure_of

MODEL = Model()
IDS = torch.tensor([[0, 1, 2]])

PLAIN_NAMES = """\
(model)  Model  @mask
  emb  Embedding  @weight
  h
    0  Block
      fc  Linear  @weight, @bias
    1  Block
      fc  Linear  @weight, @bias
  act  ReLU
  unused  Dropout"""

PLAIN_VALUES = """\
(model)  Model  {x: Tensor[1, 3, 2] float32, ids: Tensor[1, 3] int64}  @mask
  emb  Embedding  Tensor[1, 3, 2] float32  @weight
  h
    0  Block  (Tensor[1, 3, 2] float32, None)
      fc  Linear  Tensor[1, 3, 2] float32  @weight, @bias
    1  Block  (Tensor[1, 3, 2] float32, None)
      fc  Linear  Tensor[1, 3, 2] float32  @weight, @bias
  act  ReLU  Tensor[1, 3, 2] float32  × 2
  unused  Dropout  not called"""

RICH_VALUES = """\
(model)  Model  {x: Tensor[1, 3, 2] float32, ids: Tensor[1, 3] int64}  @mask
├── emb  Embedding  Tensor[1, 3, 2] float32  @weight
├── h
│   ├── 0  Block  (Tensor[1, 3, 2] float32, None)
│   │   └── fc  Linear  Tensor[1, 3, 2] float32  @weight, @bias
│   └── 1  Block  (Tensor[1, 3, 2] float32, None)
│       └── fc  Linear  Tensor[1, 3, 2] float32  @weight, @bias
├── act  ReLU  Tensor[1, 3, 2] float32  × 2
└── unused  Dropout  not called"""


def stripped(text: str) -> str:
    """Without the blanks that rich puts at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines())


# --- sites ------------------------------------------------------------------------------------------------------------


def test_without_an_example_names_and_types_alone_are_listed() -> None:
    assert sites(MODEL).plain() == PLAIN_NAMES


def test_with_an_example_structures_shapes_and_calls_are_listed() -> None:
    """However the example is passed."""
    assert sites(MODEL, IDS).plain() == PLAIN_VALUES
    assert sites(MODEL, ids=IDS, scale=2.0).plain() == PLAIN_VALUES


def test_where_rich_is_installed_the_tree_is_drawn() -> None:
    table = sites(MODEL, IDS)
    assert stripped(str(table)) == RICH_VALUES
    assert repr(table) == str(table)


def test_where_rich_is_not_installed_the_tree_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.text", "rich.tree"):
        monkeypatch.setitem(sys.modules, name, None)
    assert str(sites(MODEL, IDS)) == repr(sites(MODEL, IDS)) == PLAIN_VALUES


def test_rich_draws_names_as_they_are() -> None:
    """What looks like its markup is none."""
    model = nn.Sequential()
    model.add_module("[bold]x[/bold]", nn.ReLU())
    assert stripped(str(sites(model))) == "(model)  Sequential\n└── \\[bold\\]x\\[\\/bold\\]  ReLU"


def test_a_table_is_a_sequence_of_records() -> None:
    table = sites(MODEL, IDS)
    assert [record.path for record in table] == ["", "emb", "h.0", "h.0.fc", "h.1", "h.1.fc", "act", "unused"]
    assert len(table) == 8
    assert table[1] == ("emb", "Embedding", "Tensor[1, 3, 2] float32", 1, ("weight",))
    assert table[-2]._asdict() == {
        "path": "act",
        "type": "ReLU",
        "value": "Tensor[1, 3, 2] float32",
        "calls": 2,
        "parameters": (),
    }
    assert table[-1]._asdict() == {"path": "unused", "type": "Dropout", "value": None, "calls": 0, "parameters": ()}
    assert table[1:3] == [table[1], table[2]]


def test_a_table_converts_to_plain_dicts() -> None:
    assert sites(nn.Sequential(nn.Linear(2, 3)), torch.ones(5, 2)).to_dicts() == [
        {"path": "", "type": "Sequential", "value": "Tensor[5, 3] float32", "calls": 1, "parameters": ()},
        {"path": "0", "type": "Linear", "value": "Tensor[5, 3] float32", "calls": 1, "parameters": ("weight", "bias")},
    ]
    assert sites(nn.ReLU()).to_dicts() == [{"path": "", "type": "ReLU", "value": None, "calls": None, "parameters": ()}]


def test_every_listed_path_selects_its_module() -> None:
    """Names with special characters too."""
    model = nn.Sequential(nn.Linear(2, 2))
    for name in ("a*b", "x/y", "#"):
        model.add_module(name, nn.ReLU())
    table = sites(model, torch.ones(1, 2))
    assert [type(select(model, record.path)[0].module).__name__ for record in table] == [
        record.type for record in table
    ]
    assert [record.calls for record in table] == [1, 1, 1, 1, 1]
    for record in table:
        for name in record.parameters:
            assert len(select(model, f"{record.path}@{name}")) == 1


def test_a_module_that_returns_different_things_shows_each_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> None:
            self.act(x), self.act(x[0]), self.act(x)

    assert sites(Twice(), torch.ones(2, 3)).to_dicts()[1]["value"] == "Tensor[2, 3] float32 | Tensor[3] float32"
    assert sites(Twice(), torch.ones(2, 3)).plain() == (
        "(model)  Twice  None\n  act  ReLU  Tensor[2, 3] float32 | Tensor[3] float32  × 3"
    )


def test_the_model_runs_once_without_gradients_and_stays_as_it_was() -> None:
    runs: list[bool] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(torch.is_grad_enabled())
            return x

    model = nn.Sequential(Counting())
    before = [dict(vars(module)) for module in model.modules()]
    sites(model, torch.ones(1))
    sites(model)
    assert runs == [False]
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_an_error_of_the_model_comes_through() -> None:
    with pytest.raises(IndexError):
        sites(MODEL, torch.tensor([99]))
    assert describe(MODEL) == []


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.ModuleList([nn.Sequential(nn.ReLU())]), "(model)  ModuleList\n  0  Sequential\n    0  ReLU"),
        (nn.ModuleDict(), "(model)  ModuleDict"),
        (nn.ReLU(), "(model)  ReLU"),
    ],
    ids=["a list", "an empty dict", "one layer"],
)
def test_the_model_itself_is_always_the_root(model: nn.Module, text: str) -> None:
    """Also where it is only a container, which is no site."""
    assert sites(model).plain() == text
    assert stripped(str(sites(model))).splitlines()[0] == text.splitlines()[0]


# --- calls ------------------------------------------------------------------------------------------------------------


MIXING = """\
(model)  Mixing  Tensor[3, 2] float32
  @matmul#0()  Tensor[3, 3] float32
  @mul()  Tensor[3, 3] float32
  @scaled()  Tensor[3, 3] float32
  @scores()  Tensor[3, 3] float32
  @softmax()  Tensor[3, 3] float32
  @matmul#1()  Tensor[3, 2] float32
  @add#0()  Tensor[3, 2] float32
  @add#1()  Tensor[3, 2] float32
  @named()  (Tensor[3, 2] float32, str)
  @sub()  Tensor[3, 2] float32
  fc  Linear  Tensor[3, 2] float32  @weight, @bias
    @linear()  Tensor[3, 2] float32"""


def test_the_calls_in_each_forward_are_listed_on_request() -> None:
    """Operators, torch functions, and all sorts of methods; not what returns no tensor."""
    model = Mixing()
    before = [dict(vars(module)) for module in model.modules()]
    assert sites(model, torch.ones(3, 2), calls=True).plain() == MIXING
    assert [dict(vars(module)) for module in model.modules()] == before
    assert len(sites(model, torch.ones(3, 2))) == 2


def test_every_listed_call_is_captured_by_its_path_and_looks_as_listed() -> None:
    model = nn.Sequential(Mixing(), Mixing(), nn.Identity())
    model.append(model[0])  # called twice
    model.add_module("a.b@c".replace(".", "-"), Mixing())
    table = sites(model, torch.ones(3, 2), calls=True)
    calls = [record for record in table if record.type == "call"]
    with capture(model, [record.path for record in calls], keep="all", map=structure_of) as acts:
        model(torch.ones(3, 2))
    assert len(calls) == 3 * 11
    for record in calls:
        assert record.value == acts[record.path][0]
        assert record.calls == len(acts[record.path]) == (2 if record.path.startswith("0") else 1)


def test_calls_of_attention_in_its_steps_are_listed() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model, x = Fused(), torch.ones(1, 2, 3, 4)
    assert [record.path for record in sites(model, x, calls=True)] == ["", "@scaled_dot_product_attention()"]
    with fused_attention_as_steps():
        paths = [record.path for record in sites(model, x, calls=True)]
        with capture(model, *paths) as acts:
            model(x)
    assert {"@softmax()", "@matmul#0()", "@matmul#1()", "@scaled_dot_product_attention()"} <= set(paths)
    assert acts["@softmax()"].shape == (1, 2, 3, 3) and acts["@scaled_dot_product_attention()"].shape == x.shape


def test_methods_that_every_module_has_are_no_calls_of_a_model() -> None:
    assert [record.path for record in sites(AsksItself(), torch.ones(3), calls=True)] == ["", "@mul()", "@scaled()"]


def test_calls_are_seen_in_an_example_alone() -> None:
    with pytest.raises(TypeError, match="sites\\(model, example, calls=True\\)"):
        sites(MODEL, calls=True)


# --- describe ---------------------------------------------------------------------------------------------------------


def test_nothing_is_active_on_a_clean_model() -> None:
    assert describe(MODEL) == []
    assert str(describe(MODEL)) == repr(describe(MODEL)) == "nothing is active"


def test_what_is_active_is_described_in_the_order_in_which_it_acts() -> None:
    """Module by module, as it was written, whatever the port; and nothing any more after leaving."""
    contexts = (
        patch(MODEL, {"emb": 0.0, "h.0[0][:, -1]": 1.0}),
        edit(MODEL, nn.ReLU, lambda value: value),
        capture(MODEL, "act", "emb@input"),
        steer(MODEL, "act", torch.zeros(2)),
        ablate(MODEL, "h.1.fc@weight", "h.1.fc/2"),
    )
    with contexts[0], contexts[1], contexts[2], contexts[3], contexts[4]:
        MODEL(IDS)
        assert [(record.path, record.intervention) for record in describe(MODEL)] == [
            ("h.1.fc@weight", "ablate(model, 'h.1.fc@weight', 'h.1.fc/2', …)"),
            ("emb", "patch(model, {'emb': …, 'h.0[0][:, -1]': …})"),
            ("emb@input", "capture(model, 'act', 'emb@input')"),
            ("h.0[0][:, -1]", "patch(model, {'emb': …, 'h.0[0][:, -1]': …})"),
            ("h.1.fc/2", "ablate(model, 'h.1.fc@weight', 'h.1.fc/2', …)"),
            ("act", "edit(model, ReLU, …)"),
            ("act", "capture(model, 'act', 'emb@input')"),
            ("act", "steer(model, 'act', …)"),
        ]
        assert {(record.scope, record.acting) for record in describe(MODEL)} == {("with", True)}
    assert describe(MODEL) == []


def test_handles_are_described_as_attached() -> None:
    handle = ablate(MODEL, "emb").attach()
    with capture(MODEL, "emb"):
        MODEL(IDS)
        assert str(describe(MODEL)) == (
            "emb  ablate(model, 'emb', …)  [attached]\n"
            "emb  capture(model, 'emb')  [with]"
        )  # fmt: skip
    handle.remove()
    assert describe(MODEL) == []


def test_what_does_not_act_here_is_described_so() -> None:
    """In another thread, contexts do not act and handles do."""
    seen: list[str] = []
    handle = ablate(MODEL, "emb").attach()
    with capture(MODEL, "emb"):
        MODEL(IDS)
        thread = threading.Thread(target=lambda: seen.append(str(describe(MODEL))))
        thread.start()
        thread.join()
    handle.remove()
    assert seen == ["emb  ablate(model, 'emb', …)  [attached]\nemb  capture(model, 'emb')  [with, not here]"]


def test_what_is_suspended_does_not_act() -> None:
    with ablate(MODEL, "emb"):
        MODEL(IDS)
        with suspend(MODEL):
            assert [(record.path, record.acting) for record in describe(MODEL)] == [("emb", False)]
        assert [(record.path, record.acting) for record in describe(MODEL)] == [("emb", True)]


def test_a_part_of_a_model_can_be_described() -> None:
    with ablate(MODEL, "h.0[0]", "emb"):
        MODEL(IDS)
        assert [record.path for record in describe(MODEL.h[0])] == ["h.0[0]"]
        assert describe(MODEL.h[1]) == []


def embeddings(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("emb", "'emb'"),
        (["emb", "act"], "'emb', 'act'"),
        (select(MODEL, "emb")[0], "'emb'"),
        (nn.Embedding, "Embedding"),
        (embeddings, "embeddings"),
        (re.compile("emb"), "re.compile('emb')"),
        (True, "True"),
    ],
    ids=["a path", "a list", "a site", "a type", "a predicate", "a regular expression", "True"],
)
def test_an_intervention_is_shown_as_it_was_written(where: Any, shown: str) -> None:
    assert repr(capture(MODEL, where)) == f"capture(model, {shown})"
    assert repr(steer(MODEL, where, torch.zeros(2))) == f"steer(model, {shown}, …)"
