"""How a sweep runs: progress, interrupts, memory, what is checked, caches of keys and values, compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from gallery.architectures import ARCHITECTURES, answer, tokens
from gallery.swept import MeanOfBatch, Small
from sweep_by_hand import far_from_loop, made
from torch import nn
from transformers import DynamicCache

from nicehooks import sweep
from nicehooks.errors import NiceHooksError

WHERE = "transformer.h.*[:, *]"


def metric(output):
    return answer(output)[:, -1, 3]


@pytest.fixture(scope="module")
def gpt2():
    return ARCHITECTURES["gpt2"].build()


def test_progress_is_told(gpt2, capsys):
    told = []
    sweep(gpt2, WHERE, 0.0, metric, tokens(0), chunk_size=8, engine="growing", progress=lambda *at: told.append(at))
    assert told == [(8, 21), (16, 21), (21, 21)]
    sweep(gpt2, WHERE, 0.0, metric, tokens(0), chunk_size=20, engine="growing", progress=True)
    shown = capsys.readouterr().err
    assert "sweep: 20 of 21, " in shown and shown.endswith("/s\n")


def test_an_interrupt_returns_what_is_done_and_it_goes_on_from_there(gpt2):
    whole = sweep(gpt2, WHERE, 0.0, metric, tokens(0))

    def interrupt(done, count):
        if done == 16:
            raise KeyboardInterrupt

    part = sweep(gpt2, WHERE, 0.0, metric, tokens(0), chunk_size=8, engine="growing", progress=interrupt)
    assert part.values.isnan().sum() == 5
    assert part.notes == ("interrupted: 16 of 21 are done; sweep(…, resume=effects) goes on.",)
    told = []
    rest = sweep(
        gpt2, WHERE, 0.0, metric, tokens(0), resume=part, engine="growing", progress=lambda *at: told.append(at)
    )
    assert told == [(21, 21)]
    assert torch.allclose(rest.values, whole.values, atol=1e-5)
    with pytest.raises(NiceHooksError, match="another sweep"):
        sweep(gpt2, "transformer.h.*", 0.0, metric, tokens(0), resume=part)


def test_without_memory_half_as_many_run_at_once():
    model, x = Small(9).eval(), torch.randn(3, 4)
    effects = sweep(model, "layer[:, *]", [0.0, 1.0], lambda output: output.sum(-1), x, engine="growing")
    assert "out of memory with 8 at once: 4 at once from there on." in effects.notes
    assert "out of memory with 4 at once: 2 at once from there on." in effects.notes
    assert effects.values.shape == (2, 4) and not effects.values.isnan().any()
    with pytest.raises(torch.OutOfMemoryError):
        sweep(Small(3).eval(), "layer[:, *]", 0.0, lambda output: output.sum(-1), x, engine="growing")


def test_memory_bounds_how_many_run_at_once(gpt2, monkeypatch):
    from nicehooks.experiments import scheduling

    monkeypatch.setattr(scheduling, "BUDGET", 1)
    told = []
    sweep(gpt2, "transformer.h.*", 0.0, metric, tokens(0), progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_way_that_does_not_fit_is_said_and_another_taken():
    model, x = made(MeanOfBatch), torch.randn(3, 4)
    effects = sweep(model, "a[:, *]", 0.0, lambda output: output.sum(-1), x)
    assert effects.notes[0].startswith("growing does not fit: the lane in which nothing is changed")
    with pytest.raises(NiceHooksError, match=r"engine='batch'\) does not fit this model"):
        sweep(model, "a[:, *]", 0.0, lambda output: output.sum(-1), x, engine="batch")


def test_each_run_has_a_cache_of_keys_and_values_of_its_own(gpt2):
    cache = DynamicCache()
    with torch.no_grad():
        gpt2(tokens(1, 1), cache=cache)
    ids = tokens(0, 1)
    effects = sweep(gpt2, WHERE, 0.0, metric, ids, cache=cache)
    assert cache.get_seq_length() == 7
    for at, path in list(enumerate(effects.sites))[::5]:
        one = sweep(gpt2, path, 0.0, metric, ids, engine="loop", cache=copy.deepcopy(cache))
        assert torch.allclose(one.values.flatten()[0], effects.values.flatten()[at], atol=1e-5)


def test_a_module_that_counts_its_calls_is_run_without_reuse():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(4, 4), nn.Linear(4, 2), 0

        def forward(self, x):
            self.calls = 0
            x = self.first(x)
            return self.second(x) * self.calls

    model = Counting().eval()
    old = type(model.first).forward

    class Noisy(nn.Linear):
        def forward(self, input):
            model.calls += 1
            return old(self, input)

    model.first.__class__ = Noisy
    x = torch.randn(3, 4)
    effects = sweep(model, "second[:, *]", 0.0, lambda output: output.sum(-1), x, engine="loop")
    assert far_from_loop(model, effects, lambda path: 0.0, lambda output: output.sum(-1), x) < 1e-4
    assert effects.notes[0].startswith("loop does not fit: ")


@pytest.mark.slow
def test_a_compiled_model_compiles_nothing_more():
    model = ARCHITECTURES["gpt2"].build()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(tokens(0))
    graphs = counter.frame_count
    effects = sweep(compiled, WHERE, 0.0, metric, tokens(0))
    assert counter.frame_count == graphs
    assert torch.allclose(effects.values, sweep(model, WHERE, 0.0, metric, tokens(0)).values, atol=1e-5)
    with torch.no_grad():
        compiled(tokens(0))
    assert counter.frame_count == graphs
