"""Every touch of the engine of `transformers` (5.24): how it is made, what it schedules, what it delivers.

NOTE [What the engine may not do]
A prompt under a function that may look at several positions is run in one forward, as it is alone. So it waits until
there is room for all of it, and those behind it wait, too; for other prompts see NOTE [Prompts in pieces]. The keys and
values of a request under a context are neither taken from the blocks that other requests have left, nor left to others:
they may come of an intervention, and what is captured has to be run. Requests without a context share theirs. Replayed
graphs and compiled forwards do not call Python, and a batch that is prepared while another one runs would be laid out
too early; all three are off.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn

from nicehooks.errors import ContextMisuse, UnsupportedModule
from nicehooks.extras import needs

SHARED_PREFIX, PRIVATE, WHOLE = "shared-", "private-", "private-whole-"
"""How the names of requests begin: those under no context, those under one, and those whose prompt is not cut."""

OFF = {"use_async_batching": False, "use_cuda_graph": False}
SMALL = {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 512}
"""What a machine without an accelerator gets: the engine itself would take most of its memory."""


class RunningEngine:
    """The engine of one model, from its start to its end.

    Args:
        deliver: is called with the name of a request, its tokens, and its error or None; in the thread of the engine.
    """

    def __init__(
        self, model: Any, generation: dict[str, Any], settings: dict[str, Any], deliver: Callable[..., None]
    ) -> None:
        with needs("hf"):
            from transformers import ContinuousBatchingConfig
        if getattr(model, "_cached_continuous_batching_manager", None) is not None:
            raise ContextMisuse(CACHED)
        chosen: dict[str, Any] = {**(SMALL if model.device.type == "cpu" else {}), **settings, **OFF}
        self.manager = model.init_continuous_batching(
            generation_config=_generation_config(model, generation),
            continuous_batching_config=ContinuousBatchingConfig(**chosen),
        )
        self.manager.output_router = _router(deliver)
        self.manager.warmup()  # makes the processor; there is no graph to warm up
        self.processor = self.manager.batch_processor
        self.cache = self.processor.cache
        _keep_prefixes_apart(self.cache)
        _keep_prompts_whole(self.processor.scheduler)

    def start(self) -> None:
        self.manager.start()

    def add(self, name: str, prompt: list[int], generation: dict[str, Any]) -> None:
        """Hands a request to the engine."""
        if self.manager.add_request(prompt, request_id=name, **generation) is None:
            raise ContextMisuse("the engine takes no more requests: it has been stopped, or has failed.")

    def refuse_unknown_options(self, generation: dict[str, Any]) -> None:
        """Refuses what a request cannot have of its own; the engine would fail it later, or pass over it."""
        known = self.processor.logit_processor.supported_keys
        for name, value in generation.items():
            if name not in OF_REQUEST and name not in known:
                text = NOT_OF_REQUEST if hasattr(self.manager.generation_config, name) else UNKNOWN_OF_REQUEST
                raise TypeError(text.format(name=name, value=value, known=", ".join([*OF_REQUEST, *known])))
            if name in known and not isinstance(value, known[name]):
                raise TypeError(f"submit({name}={value!r}): it is a {known[name].__name__}")

    def cancel(self, name: str) -> None:
        self.manager.cancel_request(name)

    def stop(self, hard: bool) -> None:
        """Ends the engine: once all requests are finished, or at once."""
        self.manager.stop(block=True, hard_stop=hard)
        self.manager.destroy()

    def scheduled(self) -> list[Any]:
        """The requests in the forward that runs now, in the order of their rows."""
        return self.processor.inputs_and_outputs.requests_in_batch

    def most_new_tokens(self, generation: dict[str, Any]) -> int | None:
        found = generation.get("max_new_tokens")
        return self.manager.generation_config.max_new_tokens if found is None else found

    @property
    def room(self) -> int:
        """For how many tokens there is memory."""
        return self.cache.max_tokens_read

    @property
    def longest_prompt(self) -> int:
        """How many tokens fit into one forward."""
        return self.cache.max_batch_tokens


CACHED = (
    "this model has an engine already, kept by `persistent_manager=True` or `keep_for_next_session=True`.\n"
    "    model.destroy_cached_continuous_batching_manager()"
)


OF_REQUEST = ("max_new_tokens", "eos_token_id", "record_timestamps")
UNKNOWN_OF_REQUEST = "submit(ids) takes no {name}=; it takes: {known}."
NOT_OF_REQUEST = (
    "submit(ids) takes no {name}=: this engine has one for all requests.\n"
    "  for all:   serving(model, generation={{{name!r}: {value!r}}})\n"
    "  for each:  serving(model, per_request_processors=True, generation={{{name!r}: …}}), if it is temperature, top_k "
    "or top_p"
)


def refuse_unknown(model: Any, generation: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuses options of `serving` that are called as nothing is.

    Raises:
        TypeError: there is one.
    """
    with needs("hf"):
        from transformers import ContinuousBatchingConfig
    for name in settings:
        if name in UNSERVED:
            raise TypeError(f"serving(model, …) takes no {name}: the engine has to call Python in each forward.")
        if name not in signature(ContinuousBatchingConfig).parameters:
            is_generation = hasattr(model.generation_config, name)
            raise TypeError((FOR_GENERATION if is_generation else UNKNOWN_SETTING).format(name=name))
    for name in generation:
        if name != "generation_config" and not hasattr(model.generation_config, name):
            raise TypeError(f"serving(model, generation={{{name!r}: …}}): a GenerationConfig has no {name}.")


UNSERVED = ("use_async_batching", "use_cuda_graph", "varlen_compile_config", "decode_compile_config")
UNKNOWN_SETTING = "serving(model, {name}=…): neither ContinuousBatchingConfig nor GenerationConfig has a {name}."
FOR_GENERATION = "serving(model, {name}=…): {name} is about generation.\n    serving(model, generation={{{name!r}: …}})"


def _generation_config(model: Any, generation: dict[str, Any]) -> Any:
    """A copy, because the engine writes into it."""
    config = copy.deepcopy(generation.pop("generation_config", None) or model.generation_config)
    config.update(**generation)
    if (config.num_return_sequences or 1) != 1 or (config.num_beams or 1) != 1:
        raise UnsupportedModule(ONE_RESULT)
    if config.eos_token_id is None:
        config.eos_token_id = -1  # as the engine would, with a warning
    return config


ONE_RESULT = "serving gives one result for each request, without beams: submit it as often as you want results."


def _router(deliver: Callable[..., None]) -> Any:
    """What the engine delivers to: each result goes straight to the one who waits for it."""
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    class Router(OutputRouter):
        def deliver(self, output: Any) -> None:
            deliver(output.request_id, output.generated_tokens, output.error)

        def deliver_batch(self, outputs: list[Any]) -> None:
            for output in outputs:
                self.deliver(output)

    return Router()


def _keep_prefixes_apart(cache: Any) -> None:
    """See NOTE [What the engine may not do]."""
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        return 0 if request_id.startswith(PRIVATE) else search(request_id, prompt_ids)

    def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
        if not state.request_id.startswith(PRIVATE):
            mark(state, complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks


def _keep_prompts_whole(scheduler: Any) -> None:
    """See NOTE [What the engine may not do]."""
    process = scheduler._process_candidates

    def process_candidates(candidates: list[Any], tokens: int, *rest: Any) -> Any:
        return process(_that_fit(candidates, tokens), tokens, *rest)

    scheduler._process_candidates = process_candidates


def _that_fit(candidates: list[Any], tokens: int) -> list[Any]:
    """Those of `candidates` whose prompt need not be split; behind one that waits, none begins."""
    if not any([state.remaining_prefill_tokens and state.request_id.startswith(WHOLE) for state in candidates]):
        return candidates
    kept: list[Any] = []
    waits = False
    for state in candidates:
        left = len(state.remaining_prefill_tokens)
        decodes = not left
        if not decodes and state.request_id.startswith(WHOLE):
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            waits = waits or tokens < prompt - state.position_offset
        if decodes or not waits:
            kept.append(state)
            tokens -= min(left or 1, max(tokens, 0))
    return kept


def is_servable(model: Any) -> bool:
    """Whether there is an engine for `model`."""
    return isinstance(model, nn.Module) and hasattr(model, "init_continuous_batching")
