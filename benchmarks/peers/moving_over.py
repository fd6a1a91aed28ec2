"""The rows of the pages for who moves over, run with the other library and compared with what nicehooks gives.

    python benchmarks/peers/moving_over.py ours OUT.pt        # in the environment of this checkout
    python benchmarks/peers/moving_over.py nnsight OUT.pt     # in the peer's: compares, and exits with 1 if one differs

`make test-peers` calls it. A row is found by its first cell; one that is not here compares no numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Callable[[], Any]]
VECTOR = torch.arange(48.0) / 48


def setting() -> tuple[Any, Tensor, Tensor]:
    """The model and the two inputs of the pages; the same in every environment."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids, other = torch.randint(1000, (2, 1, 6))
    return model, ids, other


def tokenizer() -> Any:
    """For a library that will not do without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"w": 0}, unk_token="w")), pad_token="w")


def loss_of(logits: Tensor) -> Tensor:
    """A number to go backward from."""
    return logits[0, -1, 7]


def ours() -> dict[str, Rows]:
    """With nicehooks, by page."""
    from nicehooks import ablate, anatomy, capture, edit, patch, steer

    model, ids, other = setting()
    parts = anatomy(model)

    def seen(*where: Any, given: Tensor = ids, **options: Any) -> Any:
        with capture(model, *where, **options) as acts:
            model(given)
        values = list(acts.values())
        return values[0] if len(values) == 1 else values

    def under(*contexts: Any, given: Tensor = ids) -> Tensor:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return model(given).logits

    def gradient() -> Tensor:
        with capture(model, "transformer.h.1@grad") as acts:
            loss_of(model(ids).logits).backward()
        return acts["transformer.h.1@grad"]

    def generated() -> list[Tensor]:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        with capture(model, "transformer.h.1", steps=slice(3), keep="all") as acts:
            model.generate(ids, **options)
        return acts["transformer.h.1"]

    def z() -> Tensor:
        return seen(parts.z[1]).flatten(-2)

    def attached() -> Tensor:
        handle = steer(model, "transformer.h.1", VECTOR).attach()
        logits = model(ids).logits
        handle.remove()
        return logits

    there = seen("transformer.h.1", given=other).detach()
    block = "transformer.h.1"
    nnsight: Rows = {
        "`with model.trace(ids): x = h[1].output.save()`": lambda: seen(block),
        "`h[1].attn.output[0].save()`": lambda: seen(f"{block}.attn[0]"),
        "`h[1].input.save()`, `h[1].inputs`": lambda: seen(f"{block}@input[0]"),
        "a loop over `h` that saves each": lambda: seen("transformer.h.*"),
        "`h[1].output[:, -1] = v`": lambda: under(patch(model, f"{block}[:, -1]", VECTOR)),
        "`h[1].output = fn(h[1].output)`": lambda: under(edit(model, block, lambda value: value / 2)),
        "`h[1].output[:] += v`": lambda: under(steer(model, block, VECTOR)),
        "a value of one `invoke` put into another": lambda: under(patch(model, f"{block}[:, -1]", there[:, -1])),
        "`with loss.backward(): g = h[1].output.grad.save()`": gradient,
        "`tracer.stop()`": lambda: seen(block, stop=True),
        "`h[1].skip(value)`": lambda: under(patch(model, block, there)),
        "`with model.generate(…) as tracer: for step in tracer.iter[:3]: …`": generated,
        "`with model.edit() as edited: …`": attached,
    }
    pyvene: Rows = {
        '`{"layer": 1, "component": "block_output"}`': lambda: seen(parts.resid_post[1]),
        "`block_input` · `mlp_output` · `mlp_activation`": lambda: [
            seen(part[1]) for part in (parts.resid_pre, parts.mlp_out, parts.mlp_post)
        ],
        "`attention_output` · `attention_value_output`": lambda: [seen(parts.attn_out[1]), z()],
        "`query_output` · `key_output` · `value_output`, `head_…`": lambda: [
            seen(part[1]).flatten(-2) for part in (parts.q, parts.k, parts.v)
        ],
        "`VanillaIntervention`, called with `base, [source]`": lambda: under(patch(model, block, there)),
        "`ZeroIntervention` · `AdditionIntervention`": lambda: [
            under(ablate(model, block)),
            under(steer(model, block, VECTOR)),
        ],
        "`intervention=lambda base, source: …`": lambda: under(edit(model, block, lambda value: (value + there) / 2)),
        "`source_representation=tensor`": lambda: under(patch(model, block, VECTOR)),
    }
    return {"nnsight": nnsight, "pyvene": pyvene}


def with_nnsight() -> Rows:
    """As the first column writes it."""
    import nnsight

    module, ids, other = setting()
    model: Any = nnsight.NNsight(module)
    h, v = model.transformer.h, VECTOR

    def values(read: Callable[[], Any]) -> Any:
        with model.trace(ids):
            found = nnsight.save(read())
        return found

    def logits(change: Callable[[], Any]) -> Tensor:
        with model.trace(ids):
            change()
            found = model.output.logits.save()
        return found

    def assign() -> None:
        h[1].output[:, -1] = v

    def halve() -> None:
        h[1].output = h[1].output / 2

    def add() -> None:
        h[1].output[:] += v

    def there() -> Tensor:
        with model.trace(other):
            found = h[1].output.save()
        return found.detach()

    def between() -> Tensor:
        value = there()
        with model.trace(ids):
            h[1].output[:, -1] = value[:, -1]
            found = model.output.logits.save()
        return found

    def gradient() -> Tensor:
        with model.trace(ids):
            output = h[1].output
            loss = loss_of(model.output.logits)
            with loss.backward():
                found = output.grad.save()
        return found

    def stopped() -> Tensor:
        with model.trace(ids) as tracer:
            found = h[1].output.save()
            tracer.stop()
        return found

    def skipped() -> Tensor:
        value = there()
        with model.trace(ids):
            h[1].skip(value)
            found = model.output.logits.save()
        return found

    def edited() -> Tensor:
        with model.edit() as (_, changed):
            h[1].output[:] += v
        with changed.trace(ids):
            found = changed.output.logits.save()
        return found

    def generated() -> list[Tensor]:
        wrapped: Any = nnsight.LanguageModel(module, tokenizer=tokenizer())
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        with wrapped.generate(ids, **options) as tracer:
            found = nnsight.save([])
            for _ in tracer.iter[:3]:
                found.append(wrapped.transformer.h[1].output)
        return found

    return {
        "`with model.trace(ids): x = h[1].output.save()`": lambda: values(lambda: h[1].output),
        "`h[1].attn.output[0].save()`": lambda: values(lambda: h[1].attn.output[0]),
        "`h[1].input.save()`, `h[1].inputs`": lambda: values(lambda: h[1].input),
        "a loop over `h` that saves each": lambda: values(lambda: [block.output for block in h]),
        "`h[1].output[:, -1] = v`": lambda: logits(assign),
        "`h[1].output = fn(h[1].output)`": lambda: logits(halve),
        "`h[1].output[:] += v`": lambda: logits(add),
        "a value of one `invoke` put into another": between,
        "`with loss.backward(): g = h[1].output.grad.save()`": gradient,
        "`tracer.stop()`": stopped,
        "`h[1].skip(value)`": skipped,
        "`with model.generate(…) as tracer: for step in tracer.iter[:3]: …`": generated,
        "`with model.edit() as edited: …`": edited,
    }


def with_pyvene() -> Rows:
    """As the first column writes it."""
    import pyvene

    module, ids, other = setting()

    def made(component: str, **more: Any) -> Any:
        return pyvene.IntervenableModel([{"layer": 1, "component": component, **more}], model=module)

    def value(component: str) -> Tensor:
        more = {"unit": "pos", "max_number_of_units": 6, "intervention_type": pyvene.CollectIntervention}
        found = made(component, **more)({"input_ids": ids}, unit_locations={"base": [[list(range(6))]]})
        return found[0][1][0].reshape(1, 6, -1)

    def changed(source: Tensor | None = None, given: Tensor | None = None, **more: Any) -> Tensor:
        model = made("block_output", **more)
        sources = None if source is None else [{"input_ids": source}]
        kept = None if given is None else {next(iter(model.interventions)): given}
        places = {"sources->base": list(range(6))} if source is not None else None
        return model({"input_ids": ids}, sources, places, source_representations=kept)[1].logits

    return {
        '`{"layer": 1, "component": "block_output"}`': lambda: value("block_output"),
        "`block_input` · `mlp_output` · `mlp_activation`": lambda: [
            value(name) for name in ("block_input", "mlp_output", "mlp_activation")
        ],
        "`attention_output` · `attention_value_output`": lambda: [
            value(name) for name in ("attention_output", "attention_value_output")
        ],
        "`query_output` · `key_output` · `value_output`, `head_…`": lambda: [
            value(name) for name in ("query_output", "key_output", "value_output")
        ],
        "`VanillaIntervention`, called with `base, [source]`": lambda: changed(
            other, intervention_type=pyvene.VanillaIntervention
        ),
        "`ZeroIntervention` · `AdditionIntervention`": lambda: [
            changed(intervention_type=pyvene.ZeroIntervention),
            changed(given=VECTOR, intervention_type=pyvene.AdditionIntervention),
        ],
        "`intervention=lambda base, source: …`": lambda: changed(
            other, intervention=lambda base, source: (base + source) / 2
        ),
        "`source_representation=tensor`": lambda: changed(given=VECTOR, intervention_type=pyvene.VanillaIntervention),
    }


def _plain(value: Any) -> Any:
    """Without what the file would need of this library."""
    return value.detach() if isinstance(value, Tensor) else [each.detach() for each in value]


def apart(expected: Any, found: Any) -> float:
    """The largest difference of two values, or of the values in two lists."""
    if isinstance(expected, Tensor):
        return float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    return max(apart(*pair) for pair in zip(expected, found, strict=True))


def compare(rows: Rows, expected: dict[str, Any]) -> bool:
    """Prints each row, and says whether all are the same."""
    fine = rows.keys() == expected.keys()
    for row, theirs in rows.items():
        try:
            off = apart(expected[row], theirs())
            said = "the same" if off < 1e-5 else f"another, off by {off:.1g}"
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fine &= said == "the same"
        print(f"{said}: {row}", flush=True)
    return fine


def main() -> None:
    name, out = sys.argv[1:]
    if name == "ours":
        found = {page: {row: _plain(value()) for row, value in rows.items()} for page, rows in ours().items()}
        torch.save(found, out)
        return
    rows = {"nnsight": with_nnsight, "pyvene": with_pyvene}[name]()
    sys.exit(0 if compare(rows, torch.load(out)[name]) else 1)


if __name__ == "__main__":
    main()
