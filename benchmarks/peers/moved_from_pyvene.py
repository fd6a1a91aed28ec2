"""The rows of docs/from_pyvene.md, with pyvene and with nicehooks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from moving_over import Rows, generating, gpt2, pickles, shown
from torch import Tensor

WIDTH, HEADS, LENGTH = 48, 4, 6
VECTOR = torch.arange(float(WIDTH)) / WIDTH
EVERY = list(range(LENGTH))
WITHOUT = {
    "`CausalModel`, counterfactual data sets, `train_alignment`": "as there is nothing like it in nicehooks",
}


def rotation() -> Tensor:
    """Orthonormal columns, `[48, 48]`, the same everywhere."""
    return torch.linalg.qr(torch.sin(torch.arange(float(WIDTH**2))).reshape(WIDTH, WIDTH))[0]


def noise() -> Tensor:
    """What a `NoiseIntervention` of this width adds to four positions: numbers that never change."""
    import numpy

    return torch.from_numpy(numpy.random.RandomState(1).randn(1, 4, WIDTH) * 0.13462981581687927).float()


def scored(model: Any, ids: Tensor) -> dict[str, Any]:
    """Options of a generation that gives the logits of its steps."""
    return {**generating(ids), "output_logits": True, "return_dict_in_generate": True}


def ours() -> Rows:
    """With nicehooks."""
    from transformers import GPT2LMHeadModel

    from nicehooks import ActivationCache, ablate, anatomy, capture, edit, patch, steer

    model, ids, other = gpt2()
    model.requires_grad_(False)
    parts, block = anatomy(model), "transformer.h.1"

    def seen(where: Any, given: Tensor = ids) -> Tensor:
        with capture(model, where) as acts:
            model(given)
        return acts[where]

    def under(*contexts: Any, given: Tensor = ids) -> Tensor:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return model(given).logits

    there = seen(block, other)

    def unwrapped() -> Any:
        return shown(model(ids).logits, [isinstance(model, GPT2LMHeadModel), pickles(model)])

    def z() -> Any:
        value = seen(parts.z[1])
        return shown([seen(parts.attn_out[1]), value.flatten(-2)], list(value.shape))

    def qkv() -> Any:
        values = [seen(part[1]) for part in (parts.q, parts.k, parts.v)]
        heads = [seen(part[1].head(2)) for part in (parts.q, parts.k, parts.v)]
        return shown([value.flatten(-2) for value in values] + heads, list(values[0].shape))

    def moved() -> list[Tensor]:
        return [
            under(patch(model, f"{block}[:, 3]", there[:, 3])),
            under(patch(model, f"{block}[:, 5]", there[:, 2])),
            under(patch(model, f"{block}[:, [1, 4]]", there[:, [0, 2]])),
        ]

    def noisy() -> Tensor:
        return under(edit(model, f"{block}[:, :4]", lambda value: value + noise()))

    def mean() -> Any:
        def halfway(value: Tensor) -> Tensor:
            return (value + there) / 2

        return shown(under(edit(model, block, halfway)), halfway.__code__.co_argcount)

    def rotated(first: int, columns: slice) -> Tensor:
        basis = rotation()[:, columns][:, :first]
        learned = edit(model, f"{block}[:, 3]", lambda value: value + (there[:, 3] - value) @ basis @ basis.T)
        once = under(learned)
        fixed = under(patch(model, f"{block}[:, 3]", there[:, 3], subspace=basis))
        assert torch.allclose(once, fixed, atol=1e-5)
        return once

    def subspaces() -> list[Tensor]:
        return [
            rotated(WIDTH, slice(0, 16)),
            under(patch(model, f"{block}[:, 3, 0:16]", there[:, 3, 0:16])),
        ]

    def several() -> list[Tensor]:
        lower, third = seen("transformer.h.0", other), seen(block, other.flip(-1))
        first, last = "transformer.h.0[:, 2]", f"{block}[:, 4]"
        parallel = under(patch(model, first, lower[:, 2]), patch(model, last, third[:, 4]))
        with patch(model, first, lower[:, 2]):
            between = seen(block, other.flip(-1))
        return [parallel, under(patch(model, last, between[:, 4]))]

    def generated() -> list[Tensor]:
        with steer(model, block, VECTOR * 9, steps=0):
            prompt = model.generate(ids, **scored(model, ids)).logits
        with steer(model, block, VECTOR * 9, steps=slice(1, None)):
            rest = model.generate(ids, **scored(model, ids)).logits
        return [*prompt, *rest]

    def saved() -> Any:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "acts.safetensors"
            with capture(model, block) as acts:
                model(other)
            acts.save(file)
            return shown(under(patch(model, ActivationCache.load(file))), hasattr(patch(model, acts), "save"))

    return {
        "`IntervenableModel(config, model)`": unwrapped,
        '`{"layer": 1, "component": "block_output"}`': lambda: [seen(parts.resid_post[1]), seen(block)],
        "`block_input` · `mlp_output` · `mlp_activation`": lambda: [
            seen(part[1]) for part in (parts.resid_pre, parts.mlp_out, parts.mlp_post)
        ],
        "`attention_output` · `attention_value_output`": z,
        "`head_attention_value_output`, with a head as unit": lambda: seen(parts.z[1].head(2)),
        "`query_output` · `key_output` · `value_output`, `head_…`": qkv,
        '`component="h[1].attn.output"`, a string': lambda: seen(f"{block}.attn[0]"),
        '`unit="pos"` and `unit_locations={"sources->base": (…)}`': moved,
        "`VanillaIntervention`, called with `base, [source]`": lambda: under(patch(model, block, there)),
        "`ZeroIntervention` · `AdditionIntervention`": lambda: [
            under(ablate(model, block)),
            under(steer(model, block, VECTOR)),
        ],
        "`NoiseIntervention`": noisy,
        "`CollectIntervention`": lambda: seen(f"{block}[:, [1, 4]]"),
        "`intervention=lambda base, source: …`": mean,
        "`source_representation=tensor`": lambda: under(patch(model, block, VECTOR)),
        "`RotatedSpaceIntervention`, `LowRankRotatedSpaceIntervention`": lambda: [
            rotated(WIDTH, slice(None)),
            rotated(4, slice(None)),
        ],
        "`subspaces=[…]`": subspaces,
        "several sources, parallel or serial": several,
        "`.generate(…, intervene_on_prompt=True)`": generated,
        "`.save`, `.load`, sharing on a hub": saved,
    }


def theirs() -> Rows:
    """With pyvene, as the first column writes it."""
    import pyvene
    from transformers import GPT2LMHeadModel

    module, ids, other = gpt2()
    base, source = {"input_ids": ids}, {"input_ids": other}

    def made(component: str = "block_output", layer: int = 1, **more: Any) -> Any:
        return pyvene.IntervenableModel([{"layer": layer, "component": component, **more}], model=module)

    def raw(component: str, where: Any = EVERY, **more: Any) -> Tensor:
        options = {"unit": "pos", "max_number_of_units": LENGTH, "intervention_type": pyvene.CollectIntervention}
        found = made(component, **{**options, **more})(base, unit_locations={"base": [[where]]})
        return found[0][1][0]

    def value(component: str, **more: Any) -> Tensor:
        return raw(component, **more).reshape(1, LENGTH, -1)

    def head(component: str) -> Tensor:
        return raw(component, [2], unit="h", max_number_of_units=1).reshape(1, LENGTH, -1)

    def changed(given: Tensor | None = None, places: Any = None, subspaces: Any = None, **more: Any) -> Tensor:
        model = made(**more)
        kept = None if given is None else {next(iter(model.interventions)): given}
        sources = [source] if places is not None else None
        to = None if places is None else {"sources->base": places}
        return model(base, sources, to, source_representations=kept, subspaces=subspaces)[1].logits

    vanilla = pyvene.VanillaIntervention

    def wrapped() -> Any:
        model = made(intervention_type=vanilla)
        plain = model(base, [source], {"sources->base": EVERY}, output_original_output=True)[0].logits
        return shown(plain, [isinstance(model, GPT2LMHeadModel), pickles(model)])

    def z() -> Any:
        found = value("attention_value_output")
        return shown([value("attention_output"), found], list(found.shape))

    def qkv() -> Any:
        values = [value(f"{name}_output") for name in ("query", "key", "value")]
        heads = [head(f"head_{name}_output") for name in ("query", "key", "value")]
        return shown(values + heads, list(values[0].shape))

    def by_string() -> Tensor:
        options = {"unit": "pos", "max_number_of_units": LENGTH, "intervention_type": pyvene.CollectIntervention}
        model = pyvene.IntervenableModel([{"component": "transformer.h[1].attn.output", **options}], model=module)
        return model(base, unit_locations={"base": [[EVERY]]})[0][1][0].reshape(1, LENGTH, -1)

    def moved() -> list[Tensor]:
        return [
            changed(places=3, intervention_type=vanilla),
            changed(places=([[[2]]], [[[5]]]), intervention_type=vanilla),
            changed(places=([[[0, 2]]], [[[1, 4]]]), intervention_type=vanilla, max_number_of_units=2),
        ]

    def noisy() -> Tensor:
        model = made(intervention_type=pyvene.NoiseIntervention)
        return model(base, unit_locations={"base": [[EVERY[:4]]]})[1].logits

    def mean() -> Any:
        def halfway(base: Tensor, source: Tensor) -> Tensor:
            return (base + source) / 2

        return shown(changed(places=EVERY, intervention=halfway), halfway.__code__.co_argcount)

    def rotated(kind: Any, columns: int, subspaces: Any = None, **more: Any) -> Tensor:
        model = made(intervention_type=kind, **more)
        layer = next(iter(model.interventions.values())).rotate_layer
        layer.weight = rotation()[:, :columns]
        return model(base, [source], {"sources->base": 3}, subspaces=subspaces)[1].logits

    def subspaces() -> list[Tensor]:
        first = [[list(range(16))]]
        return [
            rotated(pyvene.RotatedSpaceIntervention, WIDTH, first),
            changed(places=3, subspaces=first, intervention_type=vanilla),
        ]

    def several() -> list[Tensor]:
        third = {"input_ids": other.flip(-1)}
        found = []
        for mode, places in (
            ("parallel", {"sources->base": ([[[2]], [[4]]], [[[2]], [[4]]])}),
            ("serial", {"source_0->source_1": ([[[2]]], [[[2]]]), "source_1->base": ([[[4]]], [[[4]]])}),
        ):
            config = pyvene.IntervenableConfig(
                [
                    {"layer": layer, "component": "block_output", "intervention_type": vanilla, "group_key": layer}
                    for layer in range(2)
                ],
                mode=mode,
            )
            model = pyvene.IntervenableModel(config, model=module)
            found.append(model(base, [source, third], places)[1].logits)
        return found

    def generated() -> list[Tensor]:
        model = made(intervention_type=pyvene.AdditionIntervention, source_representation=VECTOR * 9)
        given = {**base, "attention_mask": torch.ones_like(ids)}
        options = {key: value for key, value in scored(module, ids).items() if key != "attention_mask"}
        steps: list[Tensor] = []
        for on_prompt, places in ((True, {"base": [[EVERY]]}), (False, None)):
            how = {**options, "unit_locations": places, "intervene_on_prompt": on_prompt}
            steps += model.generate(given, **how)[1].logits
        return steps

    def saved() -> Any:
        with torch.no_grad():
            there = value_of_other()
        with TemporaryDirectory() as folder:
            model = made(intervention_type=vanilla, source_representation=there)
            model.save(folder)
            loaded = pyvene.IntervenableModel.load(folder, model=module)
            return shown(loaded(base)[1].logits, hasattr(model, "save"))

    def value_of_other() -> Tensor:
        return module(other, output_hidden_states=True).hidden_states[2]

    return {
        "`IntervenableModel(config, model)`": wrapped,
        '`{"layer": 1, "component": "block_output"}`': lambda: [value("block_output"), value("block_output")],
        "`block_input` · `mlp_output` · `mlp_activation`": lambda: [
            value(name) for name in ("block_input", "mlp_output", "mlp_activation")
        ],
        "`attention_output` · `attention_value_output`": z,
        "`head_attention_value_output`, with a head as unit": lambda: head("head_attention_value_output"),
        "`query_output` · `key_output` · `value_output`, `head_…`": qkv,
        '`component="h[1].attn.output"`, a string': by_string,
        '`unit="pos"` and `unit_locations={"sources->base": (…)}`': moved,
        "`VanillaIntervention`, called with `base, [source]`": lambda: changed(places=EVERY, intervention_type=vanilla),
        "`ZeroIntervention` · `AdditionIntervention`": lambda: [
            changed(intervention_type=pyvene.ZeroIntervention),
            changed(VECTOR, intervention_type=pyvene.AdditionIntervention),
        ],
        "`NoiseIntervention`": noisy,
        "`CollectIntervention`": lambda: raw("block_output", [1, 4], max_number_of_units=2).reshape(1, 2, -1),
        "`intervention=lambda base, source: …`": mean,
        "`source_representation=tensor`": lambda: changed(VECTOR, intervention_type=vanilla),
        "`RotatedSpaceIntervention`, `LowRankRotatedSpaceIntervention`": lambda: [
            rotated(pyvene.RotatedSpaceIntervention, WIDTH),
            rotated(pyvene.LowRankRotatedSpaceIntervention, 4, low_rank_dimension=4),
        ],
        "`subspaces=[…]`": subspaces,
        "several sources, parallel or serial": several,
        "`.generate(…, intervene_on_prompt=True)`": generated,
        "`.save`, `.load`, sharing on a hub": saved,
    }
