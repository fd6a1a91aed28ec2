"""The rows of docs/from_transformer_lens.md, with TransformerLens and with nicehooks.

They run on the page's model, which has hook points, and on a GPT-2 that has none: TransformerLens has a bridge for it.
"""

from __future__ import annotations

import copy
import doctest
import re
from collections.abc import Callable
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from moving_over import DOCS, Rows, error_of, gpt2, shown, tokenizer
from torch import Tensor, nn

WITHOUT: dict[str, str] = {}
EXAMPLES = "A model that has hook points"
NAME = "blocks.0.hook_mlp_out"
NAMES = {
    "`hook_embed`, `blocks.1.hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`, `hook_attn_out`, `hook_mlp_out`": (
        "hook_embed",
        *(f"blocks.1.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")),
    ),
    "`blocks.1.mlp.hook_pre`, `hook_post`": ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"),
}
"""The rows of names that are the same, and the names."""
ATTENTION = tuple(f"blocks.1.attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern", "attn_scores"))
NORMS = tuple(f"{name}.hook_normalized" for name in ("blocks.1.ln1", "blocks.1.ln2", "ln_final"))


def page_model(root: type, point: type) -> tuple[Any, Tensor, Tensor]:
    """The model of the page, made of the classes of one of the libraries, and two inputs."""
    page = (DOCS / "from_transformer_lens.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Model(" in block]
    names: dict[str, Any] = {"HookedRootModule": root, "HookPoint": point}
    exec(code, names)
    return names["model"], names["ids"], torch.arange(15).reshape(3, 5) % 10


class Outputs(doctest.DocTestRunner):
    """What the examples of a page print, whatever that is."""

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.printed: list[tuple[str, str]] = []

    def report_start(self, out: Any, test: Any, example: Any) -> None:
        pass

    def report_success(self, out: Any, test: Any, example: Any, got: str) -> None:
        self.printed.append((example.source, got))

    report_failure = report_success

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        self.printed.append((example.source, exc_info[0].__name__))


def examples(root: type, point: type) -> Any:
    """What the examples below the page's model print: all the same, but how a cache is shown, and `dir`."""
    model, ids, _ = page_model(root, point)
    page = (DOCS / "from_transformer_lens.md").read_text()
    part = page.partition(f"## {EXAMPLES}\n")[2].partition("\n## ")[0].partition("\n### ")[2]
    names = {"torch": torch, "model": model, "ids": ids, "clean": model(ids)}
    runner, text = Outputs(), "".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))
    runner.run(doctest.DocTestParser().get_doctest(text, names, EXAMPLES, None, 0))
    own = [source.startswith("cache\n") or "handle.dir" in source for source, _ in runner.printed]
    same = [printed for mine, printed in zip(own, runner.printed, strict=True) if not mine]
    assert sum(own) == 2 and len(same) == 18, runner.printed
    return shown(same, [got[:30] for mine, (_, got) in zip(own, runner.printed, strict=True) if mine])


def masked(values: list[Tensor]) -> Any:
    """Of values whose last are scores: what is not masked is the same."""
    *others, scores = values
    return shown([*others, scores.tril()], scores[0, 0, 0, -1].item())


def llama() -> Any:
    """A model with another norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)).eval()


class Point(nn.Module):
    """A hook point alone, whose value is used three times over."""

    def __init__(self, point: nn.Module) -> None:
        super().__init__()
        self.point = point

    def seen(self) -> list[list[float]]:
        """What two hooks on the gradient see, one added before a hook that halves the value, one after it."""
        point: Any = self.point
        found: list[list[float]] = []
        point.add_hook(lambda gradient, hook: found.append(gradient.tolist()), dir="bwd")
        point.add_hook(lambda value, hook: value * 0.5)
        point.add_hook(lambda gradient, hook: found.append(gradient.tolist()), dir="bwd")
        (point(torch.ones(2, requires_grad=True)) * 3).sum().backward()
        return found


def with_hook_points(root: type, point: type) -> dict[str, Callable[[], Any]]:
    """What the first column of the second table says, and the paragraphs below it, on the model of the page."""
    model, ids, other = page_model(root, point)
    vector = torch.arange(16.0) / 16

    def hooked(*hooks: Any) -> Tensor:
        return model.run_with_hooks(ids, fwd_hooks=list(hooks))

    def cached(**options: Any) -> Any:
        return dict(model.run_with_cache(ids, **options)[1])

    def gradients() -> list[Tensor]:
        cache = cached(return_type="loss", incl_bwd=True, names_filter=NAME)
        return [cache[NAME], cache[f"{NAME}_grad"]]

    def usual() -> list[Tensor]:
        there = model.run_with_cache(other, names_filter=NAME)[1][NAME].detach()
        return [
            hooked((NAME, lambda value, hook: torch.zeros_like(value))),
            hooked((NAME, lambda value, hook: value + vector)),
            hooked((NAME, lambda value, hook: there)),
        ]

    def backward() -> Tensor:
        model.zero_grad()
        with model.hooks(bwd_hooks=[(NAME, lambda gradient, hook: (gradient * 2,))]):
            model(ids, return_type="loss").backward()
        return model.embed.weight.grad.clone()

    def staying() -> list[Tensor]:
        model.add_hook(NAME, lambda value, hook: value * 0)
        with_it = model(ids)
        model.reset_hooks()
        return [with_it, model(ids)]

    def listed() -> list[str]:
        model.add_hook(NAME, lambda value, hook: None)
        names = [name for name, handles in model.list_hooks().items() if handles]
        model.reset_hooks()
        return names

    def kept_by_helpers() -> Any:
        model.add_hook("hook_embed", lambda value, hook: value * 2, level=1)
        before = model(ids)
        model.run_with_cache(ids)
        once = torch.equal(model(ids), before)
        hooked((NAME, lambda value, hook: None))
        twice = torch.equal(model(ids), before)
        model.reset_hooks()
        return [once, twice]

    def after_an_error() -> int:
        def fails(value: Tensor, hook: Any) -> None:
            raise RuntimeError("no")

        error_of(lambda: model.run_with_hooks(ids, fwd_hooks=[("hook_embed", fails)], reset_hooks_end=False))
        left = sum(len(handles) for handles in model.list_hooks().values())
        model.reset_hooks(including_permanent=True)
        model.context_level = 0
        return left

    def through_a_cache() -> bool:
        return cached(names_filter="hook_embed")["hook_embed"].requires_grad

    def in_another_thread() -> bool:
        plain, found = model(ids), []
        with model.hooks(fwd_hooks=[(NAME, lambda value, hook: value * 0)]):
            thread = Thread(target=lambda: found.append(model(ids)))
            thread.start()
            thread.join()
        return torch.equal(found[0], plain)

    def copied() -> bool:
        plain = model(ids)
        model.add_hook(NAME, lambda value, hook: value * 0)
        clean = torch.equal(copy.deepcopy(model)(ids), plain)
        model.reset_hooks()
        return clean

    def called() -> int:
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        hooked()
        handle.remove()
        return len(calls)

    def batch_of_three() -> str:
        model.add_caching_hooks(names_filter="hook_embed", remove_batch_dim=True)
        found = error_of(lambda: model(ids))
        model.reset_hooks()
        return found

    return {
        "`model.run_with_cache(x, names_filter=h)`": lambda: cached(names_filter=NAME),
        '`model.run_with_cache(x, names_filter=lambda name: "mlp" in name)`': lambda: cached(
            names_filter=lambda name: "mlp" in name
        ),
        "`pos_slice=-1`": lambda: [
            value[:, 0] for value in cached(names_filter=lambda name: "mlp" in name, pos_slice=-1).values()
        ],
        "`incl_bwd=True`": gradients,
        "`model.run_with_hooks(x, fwd_hooks=[(h, fn)])`": lambda: hooked((NAME, lambda value, hook: value / 2)),
        "a hook that returns zeros; that adds a vector; that puts another run's value": usual,
        "`bwd_hooks=[(h, fn)]`": backward,
        "`model.add_hook(h, fn)`, `model.reset_hooks()`": staying,
        "`model.list_hooks()`": listed,
        "A wrong name is an error": lambda: error_of(lambda: cached(names_filter=["hook_embed", f"{NAME}put"])),
        "Helpers undo their own work alone.": kept_by_helpers,
        "A gradient hook stands in one line with the others.": Point(point()).seen,
        "`remove_batch_dim=True` takes one example.": batch_of_three,
        "Nothing survives an error": after_an_error,
        "The model is called, not its `forward`": called,
        "A hook assigns.": lambda: error_of(
            lambda: hooked(("blocks.1.hook_resid_post", lambda value, hook: value[:, :2]))
        ),
        "Gradients through caches.": through_a_cache,
        "Threads.": in_another_thread,
        "Copies.": copied,
    }


CLAIMS = (
    "A wrong name is an error",
    "Helpers undo their own work alone.",
    "A gradient hook stands in one line with the others.",
    "`remove_batch_dim=True` takes one example.",
    "Nothing survives an error",
    "The model is called, not its `forward`",
    "A hook assigns.",
    "Gradients through caches.",
    "Threads.",
    "Copies.",
)
"""The paragraphs that say in what TransformerLens does otherwise."""


def different(rows: dict[str, Callable[[], Any]]) -> Rows:
    """Rows of which nothing is the same."""
    return {row: lambda fn=fn: shown([], fn()) for row, fn in rows.items()}


def ours() -> Rows:
    """With nicehooks: by paths, where a row of the second table has one, and by its own hook points."""
    from nicehooks import ablate, anatomy, capture, describe, edit, head_results, patch, steer
    from nicehooks.hookpoints import HookedRootModule, HookPoint, hooked

    lm, tokens, more = gpt2()
    both = torch.cat([tokens, more])
    parts = anatomy(lm)

    def values(*names: str, given: Tensor = tokens) -> list[Tensor]:
        cache = hooked(lm).run_with_cache(given, names_filter=list(names))[1]
        return [cache[name] for name in names]

    def position() -> Any:
        (value,) = values("hook_pos_embed", given=both)
        return shown(value[0], list(value.shape))

    def norms() -> Any:
        other = llama()

        def refused() -> None:
            hooked(other).run_with_cache(torch.tensor([[3, 1]]), names_filter="blocks.1.ln1.hook_normalized")

        return shown(values(*NORMS), error_of(refused))

    def results() -> Any:
        with capture(lm, parts.z) as acts:
            lm(tokens)
        return shown(head_results(lm, acts), error_of(lambda: values("blocks.1.ln1.hook_scale")))

    def gradient_inside() -> str:
        def run() -> None:
            hooks = [("blocks.1.attn.hook_pattern", lambda gradient, hook: None)]
            hooked(lm).run_with_hooks(tokens, bwd_hooks=hooks).logits.sum().backward()

        return error_of(run)

    def parts_and_paths() -> list[Tensor]:
        with capture(lm, parts.resid_post, parts.z[1]) as acts:
            lm(tokens)
        last = hooked(lm).run_with_cache(tokens, names_filter=["transformer.h.*[:, -1]"])[1]
        return [acts[parts.resid_post[1]], acts[parts.z[1]], *last.values()]

    model, ids, other = page_model(HookedRootModule, HookPoint)
    vector = torch.arange(16.0) / 16

    def seen(*where: str) -> dict[str, Tensor]:
        with capture(model, *where) as acts:
            model(ids)
        return {name: value for name, value in acts.items() if "hook" in name}

    def under(context: Any) -> Tensor:
        with context:
            return model(ids)

    def gradients() -> list[Tensor]:
        with capture(model, NAME, f"{NAME}@grad") as acts:
            model(ids, return_type="loss").backward()
        return [acts[NAME], acts[f"{NAME}@grad"]]

    def usual() -> list[Tensor]:
        with capture(model, NAME) as acts:
            model(other)
        return [under(context) for context in (ablate(model, NAME), steer(model, NAME, vector), patch(model, acts))]

    def backward() -> Tensor:
        model.zero_grad()
        with edit(model, f"{NAME}@grad", lambda gradient: gradient * 2):
            model(ids, return_type="loss").backward()
        return model.embed.weight.grad.clone()

    def staying() -> list[Tensor]:
        handle = edit(model, NAME, lambda value: value * 0).attach()
        with_it = model(ids)
        handle.remove()
        return [with_it, model(ids)]

    def listed() -> list[str]:
        handle = edit(model, NAME, lambda value: value).attach()
        names = [record.path for record in describe(model)]
        handle.remove()
        return names

    by_path = {
        "`model.run_with_cache(x, names_filter=h)`": lambda: seen(NAME),
        '`model.run_with_cache(x, names_filter=lambda name: "mlp" in name)`': lambda: seen("**.*mlp*"),
        "`pos_slice=-1`": lambda: list(seen("blocks.*.hook_mlp_out[:, -1]").values()),
        "`incl_bwd=True`": gradients,
        "`model.run_with_hooks(x, fwd_hooks=[(h, fn)])`": lambda: under(edit(model, NAME, lambda value: value / 2)),
        "a hook that returns zeros; that adds a vector; that puts another run's value": usual,
        "`bwd_hooks=[(h, fn)]`": backward,
        "`model.add_hook(h, fn)`, `model.reset_hooks()`": staying,
        "`model.list_hooks()`": listed,
    }
    by_points = with_hook_points(HookedRootModule, HookPoint)
    return {
        **{row: lambda names=names: values(*names) for row, names in NAMES.items()},
        "`blocks.1.attn.hook_q`, `hook_k`, `hook_v`, `hook_z`, `hook_attn_scores`, `hook_pattern`": lambda: masked(
            values(*ATTENTION)
        ),
        "`hook_pos_embed`": position,
        "`blocks.1.ln1.hook_normalized`, `ln2`, `ln_final.hook_normalized`": norms,
        "`hook_scale`, `attn.hook_result`, `hook_q_input`, …": results,
        "gradients at `hook_pattern`, `hook_attn_scores`, `hook_resid_mid`": lambda: shown([], gradient_inside()),
        '`"resid_post"`, `parts.z[1]`, `"transformer.h.*[:, -1]"`': parts_and_paths,
        **{row: lambda row=row, fn=fn: [fn(), by_points[row]()] for row, fn in by_path.items()},
        **different({row: by_points[row] for row in CLAIMS}),
        EXAMPLES: lambda: examples(HookedRootModule, HookPoint),
    }


def theirs() -> Rows:
    """With TransformerLens: a bridge over the GPT-2, and its hook points in the model of the page."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    lm, tokens, more = gpt2()
    both = torch.cat([tokens, more])

    def bridged(model: Any) -> Any:
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            words = AutoTokenizer.from_pretrained(folder)
            bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=words, device="cpu")
        return bridge.eval()

    bridge = bridged(lm)

    def values(*names: str, given: Tensor = tokens) -> list[Tensor]:
        cache = bridge.run_with_cache(given, names_filter=list(names))[1]
        return [cache[name] for name in names]

    def position() -> Any:
        (value,) = values("hook_pos_embed", given=both)
        return shown(value[0], list(value.shape))

    def norms() -> Any:
        other = bridged(llama())

        def run() -> None:
            other.run_with_cache(torch.tensor([[3, 1]]), names_filter="blocks.1.ln1.hook_normalized")

        return shown(values(*NORMS), error_of(run))

    def results() -> Any:
        bridge.set_use_attn_result(True)
        found = torch.stack(values(*(f"blocks.{layer}.attn.hook_result" for layer in range(3))))
        bridge.set_use_attn_result(False)
        return shown(found, error_of(lambda: values("blocks.1.ln1.hook_scale")))

    def gradient_inside() -> str:
        def run() -> None:
            with bridge.hooks(bwd_hooks=[("blocks.1.attn.hook_pattern", lambda gradient, hook: None)]):
                bridge(tokens).sum().backward()

        return error_of(run)

    def parts_and_paths() -> list[Tensor]:
        cache = bridge.run_with_cache(tokens)[1]
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
        last = bridge.run_with_cache(tokens, names_filter=names, pos_slice=-1)[1]
        return [cache["resid_post", 1], cache["z", 1], *(last[name][:, 0] for name in names)]

    by_points = with_hook_points(HookedRootModule, HookPoint)
    return {
        **{row: lambda names=names: values(*names) for row, names in NAMES.items()},
        "`blocks.1.attn.hook_q`, `hook_k`, `hook_v`, `hook_z`, `hook_attn_scores`, `hook_pattern`": lambda: masked(
            values(*ATTENTION)
        ),
        "`hook_pos_embed`": position,
        "`blocks.1.ln1.hook_normalized`, `ln2`, `ln_final.hook_normalized`": norms,
        "`hook_scale`, `attn.hook_result`, `hook_q_input`, …": results,
        "gradients at `hook_pattern`, `hook_attn_scores`, `hook_resid_mid`": lambda: shown([], gradient_inside()),
        '`"resid_post"`, `parts.z[1]`, `"transformer.h.*[:, -1]"`': parts_and_paths,
        **{row: lambda fn=fn: [fn(), fn()] for row, fn in by_points.items() if row not in CLAIMS},
        **different({row: by_points[row] for row in CLAIMS}),
        EXAMPLES: lambda: examples(HookedRootModule, HookPoint),
    }
