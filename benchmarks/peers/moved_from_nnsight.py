"""The rows of docs/from_nnsight.md, with nnsight and with nicehooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from moving_over import Rows, error_of, generating, gpt2, loss_of, names_run, pickles, shown, tokenizer
from torch import Tensor, nn

VECTOR = torch.arange(48.0) / 48
WITHOUT = {
    "`remote=True` (NDIF), vLLM, diffusion pipelines": "as it needs a server, a GPU engine or trained models",
}


def kind_of_output(module: nn.Module, call: Callable[[], Any]) -> str:
    """The class of what a module returned in a call."""
    kinds: list[str] = []
    handle = module.register_forward_hook(lambda *given: kinds.append(type(given[-1]).__name__))
    try:
        call()
    finally:
        handle.remove()
    return kinds[-1]


def children_of(text: str) -> list[str]:
    """The names and classes in what a model prints."""
    return re.findall(r"^ *\((.+?)\): ((?:\d+ x )?\w+)", text, re.MULTILINE)


def ours() -> Rows:
    """With nicehooks."""
    from transformers import GPT2LMHeadModel

    from nicehooks import capture, captured, describe, edit, patch, sites, steer

    model, ids, other = gpt2()
    block = "transformer.h.1"

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

    there = seen(block, given=other).detach()

    def unwrapped() -> Any:
        return shown(model(ids).logits, [isinstance(model, GPT2LMHeadModel), pickles(model)])

    def inputs() -> list[Tensor]:
        with capture(model, f"{block}@input[0]", f"{block}@input") as acts:
            model(ids)
        return [acts[f"{block}@input[0]"], acts[f"{block}@input['hidden_states']"]]

    def cached() -> dict[str, Tensor]:
        with capture(model, "**") as acts:
            model(ids)
        return {name: acts[name] for name, value in acts.items() if isinstance(value, Tensor)}

    def assigned() -> Any:
        with capture(model, block) as before:
            logits = under(patch(model, f"{block}[:, -1]", VECTOR))
        return shown(logits, torch.equal(before[block][0, -1], VECTOR))

    def between() -> Any:
        logits = under(patch(model, f"{block}[:, -1]", there[:, -1]))

        def too_late() -> None:
            with patch(model, f"{block}#1", 0.0):
                model(ids)

        return shown(logits, error_of(too_late))

    def in_one_batch() -> list[Tensor]:
        with patch(model, f"{block}[0, -1]", VECTOR), steer(model, f"{block}[1]", VECTOR):
            return list(model(torch.cat([ids, other])).logits)

    def gradient() -> Tensor:
        with capture(model, f"{block}@grad") as acts:
            loss_of(model(ids).logits).backward()
        return acts[f"{block}@grad"]

    def inside() -> Any:
        eager = gpt2()[0]
        eager.set_attn_implementation("eager")
        site = f"{block}.attn@softmax()"
        return shown(captured(eager, site)(ids)[1][site], site.partition("@")[2])

    def stopped() -> list[Any]:
        found: list[Tensor] = []
        ran = names_run(model, lambda: found.append(seen(block, stop=True)))
        return [found[0], f"{block}.mlp" in ran, "transformer.h.2" in ran, "lm_head" in ran]

    def skipped() -> Any:
        found: list[Tensor] = []
        ran = names_run(model, lambda: found.append(under(patch(model, block, there))))
        return shown(found[0], f"{block}.mlp" in ran)

    def generated() -> list[Tensor]:
        with capture(model, block, steps=slice(3), keep="all") as acts:
            model.generate(ids, **generating(ids))
        return acts[block]

    def attached() -> Any:
        handle = steer(model, block, VECTOR).attach()
        logits, acting = model(ids).logits, [record.path for record in describe(model)]
        handle.remove()
        return shown([logits, model(ids).logits], acting == [block])

    def shapes() -> Any:
        found = {record.path: record.value for record in sites(model, ids)}[block]
        size = [int(each) for each in re.findall(r"\d+", found.partition("]")[0])]
        return shown(size, kind_of_output(model.transformer.h[1], lambda: sites(model, ids)))

    return {
        '`model = TransformersModel("gpt2")`, or `NNsight(module)`': unwrapped,
        "`with model.trace(ids): x = h[1].output.save()`": lambda: seen(block),
        "`h[1].attn.output[0].save()`": lambda: seen(f"{block}.attn[0]"),
        "`h[1].input.save()`, `h[1].inputs`": inputs,
        "a loop over `h` that saves each": lambda: seen("transformer.h.*"),
        "`tracer.cache()`": cached,
        "`h[1].output[:, -1] = v`": assigned,
        "`h[1].output = fn(h[1].output)`": lambda: under(edit(model, block, lambda value: value / 2)),
        "`h[1].output[:] += v`": lambda: under(steer(model, block, VECTOR)),
        "a value of one `invoke` put into another": between,
        "`with tracer.invoke(a): …`, `with tracer.invoke(b): …`": in_one_batch,
        "`with loss.backward(): g = h[1].output.grad.save()`": gradient,
        "`h[1].attn.source.…output`": inside,
        "`tracer.stop()`": stopped,
        "`h[1].skip(value)`": skipped,
        "`with model.generate(…) as tracer: for step in tracer.iter[:3]: …`": generated,
        "`with model.edit() as (tracer, edited): …`": attached,
        "`with model.scan(ids): …shape`": shapes,
        "`print(model)`": lambda: children_of(str(model)),
    }


def theirs() -> Rows:
    """With nnsight, as the first column writes it."""
    import nnsight
    from transformers import GPT2LMHeadModel

    module, ids, other = gpt2()

    def wrapped(whole: Any) -> Any:
        return nnsight.TransformersModel(whole, task="text-generation", tokenizer=tokenizer())

    model: Any = wrapped(module)
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

    def there() -> Tensor:
        with model.trace(other):
            found = h[1].output.save()
        return found.detach()

    def as_wrapper() -> Any:
        with nnsight.NNsight(module).trace(ids) as tracer:
            found = tracer.result.save()
        return shown(found.logits, [isinstance(model, GPT2LMHeadModel), pickles(model)])

    def cached() -> dict[str, Tensor]:
        with model.trace(ids) as tracer:
            cache = tracer.cache()
        names = cache.keys()  # it gives no iterator itself
        kept = {name.removeprefix("model").removeprefix("."): cache[name].output for name in names}
        return {name: value for name, value in kept.items() if isinstance(value, Tensor)}

    def assigned() -> Any:
        with model.trace(ids):
            before = h[1].output.save()
            h[1].output[:, -1] = v
            found = model.output.logits.save()
        return shown(found, torch.equal(before[0, -1], v))

    def halve() -> None:
        h[1].output = h[1].output / 2

    def add() -> None:
        h[1].output[:] += v

    def between() -> Any:
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(other):
                value = h[1].output[:, -1]
                barrier()
            with tracer.invoke(ids):
                barrier()
                h[1].output[:, -1] = value
                found = model.output.logits.save()

        def unmet() -> None:
            with model.trace() as tracer:
                with tracer.invoke(other):
                    value = h[1].output[:, -1]
                with tracer.invoke(ids):
                    h[1].output[:, -1] = value

        return shown(found, error_of(unmet))

    def in_one_batch() -> list[Tensor]:
        with model.trace() as tracer:
            with tracer.invoke(ids):
                h[1].output[:, -1] = v
                one = model.output.logits.save()
            with tracer.invoke(other):
                h[1].output[:] += v
                two = model.output.logits.save()
        return [one[0], two[0]]

    def gradient() -> Tensor:
        with model.trace(ids):
            output = h[1].output
            loss = loss_of(model.output.logits)
            with loss.backward():
                found = output.grad.save()
        return found

    def inside() -> Any:
        eager = gpt2()[0]
        eager.set_attn_implementation("eager")
        whole = wrapped(eager)
        attn, path = whole.transformer.h[1].attn, "attention_interface_1.source.nn_functional_softmax_0"
        with whole.trace(ids):
            found = attn.source.attention_interface_1.source.nn_functional_softmax_0.output.save()
        return shown(found, path)

    def stopped() -> list[Any]:
        found: list[Tensor] = []

        def call() -> None:
            with model.trace(ids) as tracer:
                value = h[1].output.save()
                tracer.stop()
            found.append(value)

        ran = names_run(module, call)
        return [found[0], *(name in ran for name in ("transformer.h.1.mlp", "transformer.h.2", "lm_head"))]

    def skipped() -> Any:
        value, found = there(), []

        def call() -> None:
            with model.trace(ids):
                h[1].skip(value)
                logits = model.output.logits.save()
            found.append(logits)

        ran = names_run(module, call)
        return shown(found[0], "transformer.h.1.mlp" in ran)

    def generated() -> list[Tensor]:
        with model.generate(ids, **generating(ids)) as tracer:
            found = nnsight.save([])
            for _ in tracer.iter[:3]:
                found.append(h[1].output)
        return found

    def edited() -> Any:
        with model.edit() as (_, changed):
            changed.transformer.h[1].output[:] += v
        with changed.trace(ids):
            found = changed.output.logits.save()
        plain = values(lambda: model.output.logits)
        return shown([found, plain], changed is model)

    def shapes() -> Any:
        with model.scan(ids):
            size = nnsight.save(h[1].output.shape)

        def scan() -> None:
            with model.scan(ids):
                nnsight.save(h[1].output.shape)

        return shown(list(size), kind_of_output(h[1]._module, scan))

    return {
        '`model = TransformersModel("gpt2")`, or `NNsight(module)`': as_wrapper,
        "`with model.trace(ids): x = h[1].output.save()`": lambda: values(lambda: h[1].output),
        "`h[1].attn.output[0].save()`": lambda: values(lambda: h[1].attn.output[0]),
        "`h[1].input.save()`, `h[1].inputs`": lambda: values(lambda: [h[1].input, h[1].inputs[0][0]]),
        "a loop over `h` that saves each": lambda: values(lambda: [block.output for block in h]),
        "`tracer.cache()`": cached,
        "`h[1].output[:, -1] = v`": assigned,
        "`h[1].output = fn(h[1].output)`": lambda: logits(halve),
        "`h[1].output[:] += v`": lambda: logits(add),
        "a value of one `invoke` put into another": between,
        "`with tracer.invoke(a): …`, `with tracer.invoke(b): …`": in_one_batch,
        "`with loss.backward(): g = h[1].output.grad.save()`": gradient,
        "`h[1].attn.source.…output`": inside,
        "`tracer.stop()`": stopped,
        "`h[1].skip(value)`": skipped,
        "`with model.generate(…) as tracer: for step in tracer.iter[:3]: …`": generated,
        "`with model.edit() as (tracer, edited): …`": edited,
        "`with model.scan(ids): …shape`": shapes,
        "`print(model)`": lambda: children_of(repr(nnsight.NNsight(module))),
    }
