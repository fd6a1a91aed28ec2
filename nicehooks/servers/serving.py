"""`serving`: requests to one engine, each under interventions of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nicehooks.core import sessions
from nicehooks.core.binding import Bound, bind, taps_for, unbind
from nicehooks.core.sessions import Session
from nicehooks.errors import ContextMisuse, NiceHooksError, UnsupportedModule
from nicehooks.servers.batches import LOCKS, BeginRule, CrowdRule, PackedBatch, TurnRule, lay_out
from nicehooks.servers.engine import PRIVATE, SHARED_PREFIX, WHOLE, RunningEngine, is_servable, refuse_unknown
from nicehooks.servers.pieces import names_one_position
from nicehooks.servers.requests import ENDED, Handle, Request


class Server:
    """An engine that runs while it is entered; `submit` hands it requests, from any thread. See `serving`."""

    def __init__(self, model: nn.Module, generation: dict[str, Any], settings: dict[str, Any]) -> None:
        self.model = model
        self._generation = generation
        self._settings = settings
        self._engine: RunningEngine | None = None
        self._session = Session(repr(self), attached=True)
        self._rules: dict[nn.Module, CrowdRule] = {}
        self._bound: list[Bound] = []
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._batch: PackedBatch | None = None
        self._training: list[nn.Module] = []

    def __repr__(self) -> str:
        return f"serving({type(self.model).__name__})"

    def __enter__(self) -> Server:
        if self._engine is not None:
            raise ContextMisuse("this server is running already: each serving(model) is entered once at a time.")
        self._training = [module for module in self.model.modules() if module.training]
        self._engine = RunningEngine(self.model, dict(self._generation), self._settings, self._delivered)
        self._session = Session(repr(self), attached=True)
        sessions.number(self._session)
        sessions.begin(self._session)
        lock = LOCKS.setdefault(self.model, threading.RLock())
        for module in {self.model, getattr(self.model, "base_model", self.model)}:
            self._bind(module, TurnRule(lock))
        self._bind(self.model, BeginRule(self._begin))
        self._engine.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Waits for the requests that are there; after an error, ends them."""
        try:
            self._running().stop(hard=kind is not None)  # the interventions of those that it waits for still act
        finally:
            self._engine = None
            unbind(self._bound)
            sessions.end(self._session)
            self._bound, self._rules, self._batch = [], {}, None
            for request in list(self._requests.values()):
                request.settle(error=ENDED)
            self._requests.clear()
            for module in self._training:
                module.training = True

    def submit(self, ids: Any, under: Iterable[Any] = (), **generation: Any) -> Handle:
        """Hands a request to the engine, and returns at once.

        Args:
            ids: the prompt: a list of tokens, or a tensor of shape `[pos]` or `[1, pos]`.
            under: contexts (`capture`, `steer`, `patch`, …) that act on this request alone, in this order. They are not
                entered: the same object may be given to many requests.
            generation: what differs for this request: `max_new_tokens`, `eos_token_id`; with
                `per_request_processors=True` in `serving`, what the engine's processors take (`temperature`, …).

        Returns:
            A `Handle`: `.result()`, or `await`, gives `.tokens` and `.activations`.

        Raises:
            SiteNotFound: a path selects nothing.
            UnsupportedModule: a context is about gradients, weights or calls, which are not the request's own.
            ContextMisuse: the server is not running, or the request is too long for it.
            TypeError: nothing of a request is called as an option is, or the engine cannot tell requests apart in it.
        """
        engine, contexts = self._running(), list(under)
        if "streaming" in generation or "request_id" in generation:
            raise TypeError("submit gives one result and names its requests itself: no streaming=, no request_id=")
        engine.refuse_unknown_options(generation)
        request = Request(_as_tokens(ids, self.model), contexts, self._is_part)
        name = request.name = f"{_beginning_of_name(engine, request)}{next(self._numbers)}"
        _check_room(engine, request, engine.most_new_tokens(generation))
        for module in request.rules:
            if module not in self._rules:
                self._rules[module] = self._new_rule(module)
                self._bind(module, self._rules[module])
        self._requests[name] = request
        request.future.add_done_callback(lambda future: self._cancelled(name) if future.cancelled() else None)
        engine.add(name, request.prompt, generation)
        return Handle(request)

    def _is_part(self, module: nn.Module) -> bool:
        return module in self._rules or any(module is inner for inner in self.model.modules())

    def _running(self) -> RunningEngine:
        if self._engine is None:
            raise ContextMisuse(NOT_RUNNING)
        return self._engine

    def _new_rule(self, module: nn.Module) -> CrowdRule:
        model: Any = self.model
        is_head = module is model.get_output_embeddings()
        return CrowdRule(lambda: self._batch, self._fail, is_head or module is model, is_head)

    def _bind(self, module: nn.Module, rule: Any) -> None:
        bound = taps_for([(module, rule)])
        self._bound += bound
        bind(bound, self._session)

    # in the thread of the engine

    def _begin(self, kwargs: dict[str, Any]) -> None:
        """A forward begins: if it is the engine's, its rows are laid out."""
        engine = self._engine
        if engine is None or kwargs.get("cache") is not engine.cache:
            return
        self._batch = lay_out(engine.scheduled(), self._requests)

    def _delivered(self, name: str, tokens: list[int], error: str | None) -> None:
        request = self._requests.pop(name, None)
        if request is not None:
            failed = None if error is None else NiceHooksError(f"the engine has failed this request: {error}")
            request.settle(tokens, failed)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.settle(error=error)
        self._cancelled(request.name)

    def _cancelled(self, name: str) -> None:
        request, engine = self._requests.pop(name, None), self._engine
        if request is not None:
            request.over = True
            if engine is not None:
                engine.cancel(name)


NOT_RUNNING = (
    "this server is not running: it runs inside of its `with` block.\n"
    "    with serving(model) as server:\n"
    "        handle = server.submit(ids)"
)


def serving(model: nn.Module, *, generation: dict[str, Any] | None = None, **settings: Any) -> Server:
    """Serves many requests at once, each under interventions of its own.

    A thin layer on the continuous batching of `transformers` (`pip install nicehooks[hf]`): the engine packs the tokens
    of all requests into one forward, and every context acts on the rows of its own request, at the positions and
    `steps` that it would see if the request ran alone in a `with` block.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from nicehooks import capture, serving, steer
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes))
    >>> with serving(model) as server:
    ...     up = steer(model, "model.layers.0", torch.ones(16))
    ...     last = capture(model, "model.layers.1[:, -1]", keep="first")
    ...     handle = server.submit([3, 1, 4], under=[up, last], max_new_tokens=2)
    ...     other = server.submit([3, 1, 4], max_new_tokens=4)
    >>> result = handle.result()
    >>> len(result.tokens), result.activations["model.layers.1[:, -1]"].shape, len(other.result().tokens)
    (2, torch.Size([1, 16]), 4)

    Leaving the block waits for the requests that are there; an error in it ends them.

    Args:
        model: a language model of `transformers`.
        generation: what holds for all requests, as `GenerationConfig` takes it (`{"max_new_tokens": 20}`), or a
            `GenerationConfig` as `{"generation_config": …}`.
        settings: as `ContinuousBatchingConfig` takes them: `num_blocks` × `page_size` tokens are kept, and
            `max_batch_tokens` are run in a forward.

    Raises:
        UnsupportedModule: `model` has no such engine, or it is to give several results for a request.
        TypeError: nothing is called as an option is.
    """
    if not is_servable(model):
        raise UnsupportedModule(
            f"{type(model).__name__} is no generating model of transformers 5, which has the engine."
        )
    refuse_unknown(model, generation or {}, settings)
    return Server(model, generation or {}, settings)


def _as_tokens(ids: Any, model: Any) -> list[int]:
    tokens = ids.detach().reshape(-1).tolist() if isinstance(ids, Tensor) and ids.numel() == ids.shape[-1] else ids
    if isinstance(tokens, Tensor) or not all([isinstance(token, int) for token in tokens]):
        raise TypeError("submit(ids) takes the tokens of one prompt: a list of ints, or a tensor [pos] or [1, pos]")
    if not tokens:
        raise ValueError("submit(ids) takes at least one token")
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and not 0 <= min(tokens) <= max(tokens) < known:  # it would end the forward of all requests
        raise ValueError(f"submit(ids) takes tokens from 0 to {known - 1}, not {min(tokens)} or {max(tokens)}")
    return list(tokens)


def _beginning_of_name(engine: RunningEngine, request: Request) -> str:
    """How the engine may treat a request, as its name begins; see NOTE [What the engine may not do]."""
    if not request.contexts:
        return SHARED_PREFIX
    too_long = len(request.prompt) > engine.longest_prompt
    return WHOLE if [rule for rule in request.over_all if not (too_long and names_one_position(rule))] else PRIVATE


def _check_room(engine: RunningEngine, request: Request, most_new: int | None) -> None:
    prompt = len(request.prompt)
    if most_new is None:
        raise TypeError(HOW_MANY)
    if request.name.startswith(WHOLE) and prompt > engine.longest_prompt:
        path = next(str(rule.site) for rule in request.over_all if not names_one_position(rule))
        raise ContextMisuse(TOO_LONG.format(path=path, prompt=prompt, most=engine.longest_prompt))
    if prompt + most_new > engine.room:
        raise ContextMisuse(NO_ROOM.format(prompt=prompt, new=most_new, room=engine.room))


HOW_MANY = "how many tokens to generate at most? submit(ids, max_new_tokens=20)"
TOO_LONG = (
    "{path!r}: a function over several positions has to see all of the prompt at once, which has {prompt} tokens; "
    "{most} are run in a forward.\n"
    "    serving(model, max_batch_tokens={prompt})"
)
NO_ROOM = (
    "{prompt} tokens and {new} new ones do not fit into the engine's memory, which is for {room}.\n"
    "    serving(model, num_blocks=…, page_size=…)"
)
