"""Trained models: what contexts show and change is what hand-written hooks do, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from by_hooks import (
    arguments_by_hooks,
    changed_by_hook,
    outputs_by_hooks,
    put,
    same,
    state_of,
    unchanged,
)
from gallery.trained import Gated, minilm, silero_vad, smollm2, voice_encoder
from torch import Tensor, nn

from nicehooks import (
    KEEP,
    SiteNotFound,
    UnsupportedModule,
    ablate,
    capture,
    captured,
    edit,
    patch,
    select,
    sites,
    steer,
)

# --- SmolLM2: a trained language model --------------------------------------------------------------------------------

# The tokens of "When Mary and John went to the store, John gave a drink to", and of the same with the names exchanged.
CLEAN = torch.tensor([[2427, 5099, 284, 2322, 3514, 288, 260, 4249, 28, 2322, 4502, 253, 5968, 288]])
CORRUPTED = torch.tensor([[2427, 2322, 284, 5099, 3514, 288, 260, 4249, 28, 5099, 4502, 253, 5968, 288]])
MARY, JOHN = 5099, 2322


@pytest.fixture
def smol() -> Any:
    model = smollm2()
    before = state_of(model)
    with torch.no_grad():
        yield model
    assert state_of(model) == before


def preference(output: Any) -> float:
    """How much more likely " Mary" is than " John", in logits."""
    last = output["logits"][0, -1]
    return (last[MARY] - last[JOHN]).item()


@pytest.mark.slow
def test_smollm2_capture_sees_what_hooks_see(smol):
    expected_output, outputs = outputs_by_hooks(smol, lambda: smol(CLEAN))
    arguments = arguments_by_hooks(smol, lambda: smol(CLEAN))
    o_proj = arguments["model.layers.7.self_attn.o_proj"][0].arguments["input"]
    expected = {
        **{f"model.layers.{i}": outputs[f"model.layers.{i}"][0] for i in range(30)},
        "model.layers.7@input[0]": outputs["model.layers.6"][0],
        "model.layers.7.self_attn@input['hidden_states']": outputs["model.layers.7.input_layernorm"][0],
        "model.layers.7.self_attn@input[0][:, -1]": outputs["model.layers.7.input_layernorm"][0][:, -1],
        "model.layers.7.self_attn[0]": outputs["model.layers.7.self_attn"][0][0],
        "model.layers.7.self_attn.o_proj@input[0]": o_proj,
        "model.layers.7.self_attn.o_proj@input[0]/9": o_proj.reshape(1, 14, 9, 64),
        "model.layers.7.self_attn.o_proj@input[0]/9[:, :, 4]": o_proj[..., 256:320],
        "model.layers.7.self_attn.k_proj/3[0, 5, 2]": outputs["model.layers.7.self_attn.k_proj"][0][0, 5, 128:],
        "model.layers.29[:, -1]": outputs["model.layers.29"][0][:, -1],
        "model.layers.29[0, -3]": outputs["model.layers.29"][0][0, -3],
        "model.rotary_emb[1]": outputs["model.rotary_emb"][0][1],
        "model['last_hidden_state']": outputs["model.norm"][0],
        "['logits']": expected_output["logits"],
        "['logits'][:, -1]": expected_output["logits"][:, -1],
        "lm_head": expected_output["logits"],
    }
    with capture(smol, list(expected)) as acts:
        output = smol(CLEAN)
    assert same(output, expected_output)
    assert set(acts) == set(expected)
    assert {path for path in expected if not same(acts[path], expected[path])} == set()
    with capture(smol, "**") as everything:
        smol(CLEAN)
    assert list(everything) == list(outputs)
    assert all(same(everything[name], values[-1]) for name, values in outputs.items())


def smol_changes() -> dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]]:
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    layer = "model.layers.12"
    heads = "model.layers.7.self_attn.o_proj"
    return {
        "patch a position": (
            lambda m: patch(m, f"{layer}[:, -1]", vector),
            (layer, lambda x: put(x, (slice(None), -1), vector)),
        ),
        "ablate a head": (
            lambda m: ablate(m, f"{heads}@input[0]/9[:, :, 4]"),
            (heads, lambda x: put(x, (..., slice(256, 320)), 0.0), "input"),
        ),
        "ablate an mlp": (lambda m: ablate(m, "model.layers.3.mlp"), ("model.layers.3.mlp", torch.zeros_like)),
        "ablate an attention": (
            lambda m: ablate(m, "model.layers.3.self_attn[0]"),
            ("model.layers.3.self_attn", lambda value: (torch.zeros_like(value[0]), *value[1:])),
        ),
        "steer": (lambda m: steer(m, layer, vector, scale=2.0), (layer, lambda x: x + 2.0 * vector)),
        "edit": (
            lambda m: edit(m, f"{layer}[..., ::2]", torch.neg),
            (layer, lambda x: put(x, (..., slice(None, None, 2)), -x[..., ::2])),
        ),
        "edit the answer": (
            lambda m: edit(m, "['logits']", lambda logits: logits.softmax(-1)),
            ("", lambda output: type(output)({**output, "logits": output["logits"].softmax(-1)})),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", smol_changes())
def test_smollm2_changes_are_what_hooks_do(smol, name):
    change, by_hand = smol_changes()[name]
    with changed_by_hook(smol, *by_hand):
        expected = smol(CLEAN)
    with change(smol):
        output = smol(CLEAN)
    assert same(output, expected)
    assert not same(output["logits"], smol(CLEAN)["logits"])


@pytest.mark.slow
def test_smollm2_all_changes_at_once(smol):
    pairs = [pair for name, pair in smol_changes().items() if name != "edit the answer"]
    with ExitStack() as hooks:
        for _, by_hand in pairs:
            hooks.enter_context(changed_by_hook(smol, *by_hand))
        expected = smol(CLEAN)
    handles = [change(smol).attach() for change, _ in pairs]
    output = smol(CLEAN)
    for handle in handles:
        handle.remove()
    assert same(output["logits"], expected["logits"])


@pytest.mark.slow
def test_smollm2_activation_patching_moves_the_answer(smol):
    """The known result: the subject's second mention in the early layers, the last position in the late ones."""
    with capture(smol, "model.layers.*") as clean:
        right = preference(smol(CLEAN))
    wrong = preference(smol(CORRUPTED))
    assert right > 1 > -1 > wrong

    def restored(layer: int, position: int) -> float:
        site = f"model.layers.{layer}[:, {position}]"
        with patch(smol, {site: clean[site]}):
            return (preference(smol(CORRUPTED)) - wrong) / (right - wrong)

    assert restored(5, 9) > 0.5
    assert abs(restored(5, -1)) < 0.1
    assert restored(29, -1) == pytest.approx(1.0, abs=1e-4)
    assert restored(29, 9) == 0.0


@pytest.mark.slow
def test_smollm2_tied_embeddings(smol):
    for owner in ("lm_head", "model.embed_tokens"):
        with ablate(smol, f"{owner}@weight[{MARY}]"), capture(smol, "model.embed_tokens[0, 1]") as acts:
            logits = smol(CLEAN)["logits"]
        assert not acts["model.embed_tokens[0, 1]"].any()  # " Mary" is the second token of the sentence
        assert not logits[..., MARY].any()


# --- MiniLM: a trained encoder ----------------------------------------------------------------------------------------

TEXTS = ["A man is playing a guitar.", "Someone plays an instrument on the stage.", "The stock market fell sharply."]


def sentence_vectors(model: Any, tokenized: Any) -> Tensor:
    """What all-MiniLM-L6-v2 makes of sentences: the mean over their tokens, of length 1."""
    mask = tokenized["attention_mask"][..., None]
    hidden = model(**tokenized).last_hidden_state
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture
def mini() -> Any:
    model, tokenizer = minilm()
    before = state_of(model)
    with torch.no_grad():
        yield model, tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert state_of(model) == before


def test_minilm_capture_sees_what_hooks_see(mini):
    model, batch = mini
    vectors, expected = outputs_by_hooks(model, lambda: sentence_vectors(model, batch))
    arguments = arguments_by_hooks(model, lambda: model(**batch))
    with capture(model, "**", "encoder.layer.3.attention.output.dense@input[0]/12", "**@input") as acts:
        assert same(sentence_vectors(model, batch), vectors)
    assert all(same(acts[name], values[-1]) for name, values in expected.items())
    dense = arguments["encoder.layer.3.attention.output.dense"][0].arguments["input"]
    assert same(acts["encoder.layer.3.attention.output.dense@input[0]/12"], dense.reshape(*dense.shape[:-1], 12, 32))
    assert same(acts["encoder.layer.3@input['hidden_states']"], expected["encoder.layer.2"][0])
    assert same(acts["encoder.layer.5[:, 0]"], expected["encoder.layer.5"][0][:, 0])
    assert same(acts["['pooler_output']"], expected["pooler"][0])
    assert same(acts["['last_hidden_state'][1, :3]"], expected["encoder.layer.5"][0][1, :3])
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]  # it is the trained model


MINI_CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "ablate a head": (
        lambda m: ablate(m, "encoder.layer.3.attention.output.dense@input[0]/12[:, :, 7]"),
        ("encoder.layer.3.attention.output.dense", lambda x: put(x, (..., slice(224, 256)), 0.0), "input"),
    ),
    "ablate a layer's intermediate": (
        lambda m: ablate(m, "encoder.layer.2.intermediate[..., 100:200]", value=0.1),
        ("encoder.layer.2.intermediate", lambda x: put(x, (..., slice(100, 200)), 0.1)),
    ),
    "steer one example": (
        lambda m: steer(m, "encoder.layer.4[1]", torch.linspace(-1, 1, 384), scale=3.0),
        ("encoder.layer.4", lambda x: put(x, 1, x[1] + 3.0 * torch.linspace(-1, 1, 384))),
    ),
    "exchange two examples": (
        lambda m: edit(m, "encoder.layer.0", lambda x: x[[2, 1, 0]]),
        ("encoder.layer.0", lambda x: x[[2, 1, 0]]),
    ),
}


@pytest.mark.parametrize("name", MINI_CHANGES)
def test_minilm_changes_are_what_hooks_do(mini, name):
    model, batch = mini
    change, by_hand = MINI_CHANGES[name]
    with changed_by_hook(model, *by_hand):
        expected = model(**batch)
    with change(model):
        output = model(**batch)
    assert same(output, expected)
    assert not same(output, model(**batch))


# --- Resemblyzer: a trained LSTM with nested tuples -------------------------------------------------------------------


@pytest.fixture
def voice() -> Any:
    model = voice_encoder()
    before = state_of(model)
    yield model, torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0))
    assert state_of(model) == before
    model.zero_grad(set_to_none=True)


LSTM_PARTS: dict[str, Callable[[Any], Any]] = {
    "lstm": lambda value: value,
    "lstm[0]": lambda value: value[0],
    "lstm[0][:, -1]": lambda value: value[0][:, -1],
    "lstm[1]": lambda value: value[1],
    "lstm[1][0]": lambda value: value[1][0],
    "lstm[1][0][:, -1]": lambda value: value[1][0][:, -1],
    "lstm[1][0][-1]": lambda value: value[1][0][-1],
    "lstm[-1][-1][..., 3:7]": lambda value: value[1][1][..., 3:7],
    "lstm[0]/8[:, :, 5]": lambda value: value[0][..., 160:192],
}


@pytest.mark.parametrize("path", LSTM_PARTS)
def test_the_parts_of_an_lstm(voice, path):
    model, mels = voice
    embeds, expected = outputs_by_hooks(model, lambda: model(mels))
    with capture(model, path) as acts:
        assert same(model(mels), embeds)
    assert same(acts[path], LSTM_PARTS[path](expected["lstm"][0]))
    with edit(model, path, lambda part: part), patch(model, acts):
        assert same(model(mels), embeds)


def test_every_layer_of_an_lstm_is_a_site(voice):
    model, mels = voice
    with capture(model, "lstm[1][*][*]") as acts:
        model(mels)
    assert list(acts) == [f"lstm[1][{i}][{layer}]" for i in range(2) for layer in range(3)]
    assert {value.shape for value in acts.values()} == {(2, 256)}
    with capture(model, "lstm[0][:, -1]") as last:
        model(mels)
    assert same(acts["lstm[1][0][2]"], last["lstm[0][:, -1]"])


@pytest.mark.parametrize(
    ("change", "by_hand"),
    [
        (
            lambda m: ablate(m, "lstm[1][0][-1, :, :128]"),
            lambda value: (value[0], (put(value[1][0], (-1, slice(None), slice(128)), 0.0), value[1][1])),
        ),
        (
            lambda m: edit(m, "lstm[1][0][:, -1]", lambda hidden: hidden * 2),
            lambda value: (value[0], (put(value[1][0], (slice(None), -1), value[1][0][:, -1] * 2), value[1][1])),
        ),
        (
            lambda m: patch(m, "lstm", (KEEP, (0.5, KEEP))),
            lambda value: (value[0], (torch.full_like(value[1][0], 0.5), value[1][1])),
        ),
        (
            lambda m: edit(m, "lstm", lambda value: (value[0] + 1, (-value[1][0], value[1][1]))),
            lambda value: (value[0] + 1, (-value[1][0], value[1][1])),
        ),
        (
            lambda m: ablate(m, "lstm"),
            lambda value: (torch.zeros_like(value[0]), tuple(map(torch.zeros_like, value[1]))),
        ),
    ],
    ids=["ablate half", "edit an example", "patch with a tree", "edit the tree", "ablate the tree"],
)
def test_changes_inside_nested_tuples(voice, change, by_hand):
    model, mels = voice
    with changed_by_hook(model, "lstm", by_hand):
        expected, outputs = outputs_by_hooks(model, lambda: model(mels))
    with change(model), capture(model, "lstm") as acts:
        output = model(mels)
    assert torch.equal(output.nan_to_num(9.0), expected.nan_to_num(9.0))  # an embedding of zeros has no direction
    assert same(acts["lstm"], outputs["lstm"][0])
    assert not torch.equal(output, model(mels))


def test_a_packed_sequence_stays_one(voice):
    """A `PackedSequence` is a named tuple with a constructor of its own."""
    model, mels = voice
    packed = nn.utils.rnn.pack_padded_sequence(mels, torch.tensor([20, 13]), batch_first=True)
    expected = model.lstm(packed)
    with capture(model.lstm, "[0]['data'][..., :8]") as acts, edit(model.lstm, "", unchanged):
        assert same(model.lstm(packed), expected)
    assert same(acts["[0]['data'][..., :8]"], expected[0].data[..., :8])
    with ablate(model.lstm, "[0]['data'][..., 8:]"):
        output, _ = model.lstm(packed)
    assert type(output) is nn.utils.rnn.PackedSequence
    padded, lengths = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    by_hand, _ = nn.utils.rnn.pad_packed_sequence(expected[0], batch_first=True)
    assert lengths.tolist() == [20, 13]
    assert torch.equal(padded, put(by_hand, (..., slice(8, None)), 0.0))


def test_every_weight_of_an_lstm_is_patched(voice):
    model, mels = voice
    clean = model(mels)
    for name, parameter in model.lstm.named_parameters():
        by_hand = copy.deepcopy(model)
        getattr(by_hand.lstm, name).data.mul_(0.5)
        with patch(model, f"lstm@{name}", parameter.detach() * 0.5), capture(model, f"lstm@{name}") as acts:
            output = model(mels)
        assert torch.equal(output, by_hand(mels)), name
        assert torch.equal(acts[f"lstm@{name}"], parameter * 0.5)
        assert not torch.equal(output, clean), name
        assert torch.equal(model(mels), clean), name


def test_a_weight_of_an_lstm_that_requires_grad(voice):
    model, mels = voice
    by_hand = copy.deepcopy(model)
    value = (model.lstm.weight_hh_l0.detach() * 0.9).requires_grad_()
    by_hand.lstm.weight_hh_l0.data.copy_(value.detach())
    by_hand(mels)[:, 0].sum().backward()
    with patch(model, "lstm@weight_hh_l0", value):
        model(mels)[:, 0].sum().backward()
    assert torch.equal(value.grad, by_hand.lstm.weight_hh_l0.grad)
    assert model.lstm.weight_hh_l0.grad is None
    assert torch.equal(model.lstm.weight_ih_l2.grad, by_hand.lstm.weight_ih_l2.grad)


# --- silero-vad: TorchScript ------------------------------------------------------------------------------------------

REFUSED = "TorchScript runs its forward outside of Python"


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model: capture(model, "**").__enter__(),
        lambda model: capture(model).__enter__(),
        lambda model: capture(model, "").__enter__(),
        lambda model: patch(model, "", 0.0).__enter__(),
        lambda model: ablate(model, "_model.decoder").attach(),
        lambda model: select(model, "_model"),
        lambda model: select(model, "_model.encoder.*"),
        lambda model: edit(model, "@input[0]", abs).__enter__(),
        lambda model: select(model, "_model.decoder.rnn@weight_ih"),
        lambda model: captured(model, "**")(torch.zeros(1, 512), 16000),
        lambda model: sites(model, torch.zeros(1, 512), 16000),
    ],
    ids=[
        "capture", "capture all", "root", "patch", "child", "select", "wildcard", "input", "parameter", "captured",
        "sites",
    ],
)  # fmt: skip
def test_torchscript_is_refused(attempt):
    with pytest.raises(UnsupportedModule, match=REFUSED):
        attempt(silero_vad())


def test_torchscript_inside_a_model_is_refused_by_name():
    model = Gated()
    for path in ("vad", "*", "vad@input[0]"):
        with pytest.raises(UnsupportedModule, match=rf"^'vad' is a RecursiveScriptModule: {REFUSED}"):
            capture(model, path).__enter__()
    with pytest.raises(UnsupportedModule, match=r"^'vad"):
        capture(model, "vad._model").__enter__()


def test_what_is_around_torchscript_is_seen():
    model, sound = Gated().eval(), torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.vad.reset_states()
        _, expected = outputs_by_hooks(model.gain, lambda: model(sound))
        model.vad.reset_states()
        with capture(model, "gain", "") as acts:
            output = model(sound)
    assert same(acts["gain"], expected[""][0])
    assert same(acts[""], output)


def test_a_wrong_name_beside_torchscript_is_answered():
    with pytest.raises(SiteNotFound, match="nearest names: gain"):
        capture(Gated(), "gian").__enter__()
