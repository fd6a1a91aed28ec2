"""Every part checked by numbers on one short forward: what a layout says has to hold, or the part is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from nicehooks.anatomies.checks_of_attention import check_attention
from nicehooks.anatomies.expert_parts import TOLD, each_choice
from nicehooks.anatomies.layouts import Layout
from nicehooks.anatomies.numbers import Seen, off_by
from nicehooks.anatomies.places import PartPlaces
from nicehooks.anatomies.single_sites import sites_at
from nicehooks.anatomies.tables import Lacks
from nicehooks.caches.cache import ActivationCache
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.suspending import suspend
from nicehooks.core.sites import Site
from nicehooks.errors import SiteNotReached
from nicehooks.paths.names import escape
from nicehooks.values.trees import structure_of


def check_parts(
    model: nn.Module, names: Mapping[str, nn.Module], layouts: Sequence[Layout], runs: Sequence[Callable[[], Any]]
) -> None:
    """Checks `layouts` on one forward; what does not hold is refused in them.

    Args:
        model: the model.
        names: its modules by name.
        layouts: what is checked; the checks that were passed are written into them.
        runs: what runs the model; the next one is tried where one raises.
    """
    paths = [list(_paths(layout, layout.attention)) for layout in layouts]
    wanted = dict.fromkeys(path for each in paths for _, path in each)
    acts, output = _captured(model, sites_at(model, wanted), runs)
    for layout, each in zip(layouts, paths, strict=True):
        seen = Seen(acts, names, layout.attention)
        _check_layout(seen, layout)
        _check_chain(seen, layout)
        _check_ends(seen, layout, output)
        layout.shapes = {part: structure_of(acts[path]) for part, path in each if path in acts}
        layout.checked = CHECKED


def _check_layout(seen: Seen, layout: Layout) -> None:
    for index, places in enumerate(layout.layers):
        _refuse_unseen(seen, places)
        _check_stream(seen, layout, index)
        check_attention(seen, places)
        _check_mlp(seen, places)
        _check_experts(seen, places)


def _paths(layout: Layout, now: str) -> Iterator[tuple[str, str]]:
    """Every path that a check_parts reads, with the part that it is."""
    for places in layout.layers:
        for part in places.parts:
            path = places.path(part, now)
            if isinstance(path, str):
                yield part, path
        yield "gives", places.gives
        for step in places.form:
            yield from (("form", path) for path in (step.what, step.reads) if step.kind != "add" and path)
        yield from (("role", escape(places.roles[role])) for role in ("attn_proj", "mlp_proj") if role in places.roles)
    yield from ((part, path) for part, path in layout.singles.items() if isinstance(path, str))


def _captured(model: nn.Module, sites: list[Site], runs: Sequence[Callable[[], Any]]) -> tuple[ActivationCache, Any]:
    for at, run in enumerate(runs):
        try:
            with quiet(model), suspend(model):
                return _captured_once(model, sites, run)
        except Exception:  # whatever a model may raise that does not run like that
            if at + 1 == len(runs):
                raise
    raise AssertionError("unreachable")


def _captured_once(model: nn.Module, sites: list[Site], run: Callable[[], Any]) -> tuple[ActivationCache, Any]:
    output: Any = None
    found: list[ActivationCache] = []
    with suppress(SiteNotReached), capture(model, sites, clone=True) as acts:  # clones: a model may write into values
        found.append(acts)
        output = run()
    return found[0], output


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Inside it the model is in evaluation mode, nothing is differentiated, and compiled code runs as it is written."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for module in training:
            stack.callback(setattr, module, "training", True)
            module.training = False
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _refuse_unseen(seen: Seen, places: PartPlaces) -> None:
    for part, place in list(places.parts.items()):
        path = places.path(part, seen.now)
        if isinstance(path, str) and seen.at(path) is None:
            places.refuse(part, NOT_SEEN.format(path=path)) if not isinstance(place, Mapping) else None


# --- the stream -------------------------------------------------------------------------------------------------------


def _check_stream(seen: Seen, layout: Layout, index: int) -> None:
    """`resid_pre` and what is added to it make `resid_mid` and `resid_post`, in the form that the layer has."""
    places = layout.layers[index]
    before = [step.what for step in places.form if step.kind == "add" and places.has(step.what)]
    _check_sum(seen, places)
    if not all(places.has(what) for what in before):  # what comes later was not compared with anything
        for what in before[next(at for at, what in enumerate(before) if not places.has(what)) :]:
            if places.has(what) and what not in places.passed:
                places.refuse(what, NOT_COMPARED)


def _check_sum(seen: Seen, places: PartPlaces) -> None:
    stream = seen.part(places, "resid_pre")
    if stream is None or not places.form:
        return
    text, added = "resid_pre", list[str]()
    for step in places.form:
        before = stream
        if step.kind == "add":
            term = seen.part(places, step.what)
            if term is None or term.shape != stream.shape:
                return _refuse_terms(places, [step.what], f"it is no {tuple(stream.shape)}, which the stream is")
            stream, text = stream + term, f"{text} + {step.what}"
            added.append(step.what)
        else:
            stream = _after(seen, step.what, step.reads, stream)
            text = f"{step.kind}({text})"
            if stream is None:
                return _refuse_terms(places, added, f"{text} is not what the model has there")
        if step.kind == "add" and _is_wrong(seen, places, step.what, before, stream, added):
            return _refuse_terms(places, added[-1:], f"{text} is not the stream behind it")
    gives = seen.at(places.gives)
    wrong = None if gives is None else off_by(stream, gives, _least(seen, places, added))
    if wrong is not None:
        return _refuse_terms(places, added, f"{text} is off by {wrong} from what the layer gives")
    for part in ("resid_pre", *added, *(one for one in ("resid_mid", "resid_post") if places.has(one))):
        places.passed[part] = f"{text} = resid_post"
    return None


def _check_chain(seen: Seen, layout: Layout) -> None:
    """Where layers give no sum, it is the stream if the next layer reads it, or a table says so."""
    pairs = list(zip(layout.layers, layout.layers[1:], strict=False))
    if not layout.is_found or all(places.form for places in layout.layers):
        return
    read = [(seen.at(one.gives), seen.part(other, "resid_pre")) for one, other in pairs]
    if read and all(a is not None and b is not None and off_by(a, b) is None for a, b in read):
        for places in layout.layers:
            places.passed = {"resid_pre": NEXT_READS, "resid_post": NEXT_READS, **places.passed}
        return
    for places in (one for one in layout.layers if not one.form):
        for part in ("resid_pre", "resid_post"):
            if places.has(part):
                places.refuse(part, NO_CHAIN)


def _after(seen: Seen, path: str, reads: str, stream: Tensor) -> Tensor | None:
    """The stream behind a norm, which reads it, or behind a factor that is the same at all positions."""
    value = seen.at(path)
    if value is None or value.shape != stream.shape:
        return None
    if reads:
        read = seen.at(reads)
        return value if read is not None and off_by(read, stream) is None else None
    factor = value[:, :1] / stream[:, :1]
    return value if off_by(stream * factor.nan_to_num(), value) is None or value.shape == stream.shape else None


def _is_wrong(seen: Seen, places: PartPlaces, what: str, before: Tensor, after: Tensor, added: list[str]) -> bool:
    """Whether a named place of the stream, if it is the one behind this addition, has another value."""
    mid = seen.part(places, "resid_mid") if len(added) == _adds(places) - 1 else None
    end = seen.part(places, "resid_post") if len(added) == _adds(places) else None
    return any(off_by(after, one, _least(seen, places, added)) is not None for one in (mid, end) if one is not None)


def _adds(places: PartPlaces) -> int:
    return sum(step.kind == "add" for step in places.form)


def _least(seen: Seen, places: PartPlaces, added: Sequence[str]) -> float:
    """The size of the smallest of the terms: an error is to be small beside each of them."""
    sizes = [float(term.abs().max()) for what in added if (term := seen.part(places, what)) is not None]
    return min(sizes, default=1.0)


def _refuse_terms(places: PartPlaces, parts: Sequence[str], reason: str) -> None:
    for part in parts:
        places.refuse(part, FAILED.format(reason=reason))


# --- the MLP, and the ends --------------------------------------------------------------------------------------------


def _check_mlp(seen: Seen, places: PartPlaces) -> None:
    post, out = seen.part(places, "mlp_post"), seen.part(places, "mlp_out")
    if post is None or out is None or "mlp_proj" not in places.roles:
        return
    made = seen.run(places.roles["mlp_proj"], post)
    if made is not None and seen.reaches(made, out, places.roles.get("mlp_post_norm")):
        places.passed["mlp_post"] = "mlp_proj(mlp_post) = mlp_out"
    elif not places.has("mlp_out") or seen.at(escape(places.roles["mlp_proj"])) is None:
        return


def _check_experts(seen: Seen, places: PartPlaces) -> None:
    """The routed experts, and those that all tokens go through, make up the MLP; each alone, added up, the experts."""
    experts, shared, out = (seen.part(places, part) for part in ("experts", "shared_experts", "mlp_out"))
    if experts is None or out is None:
        return
    text = "experts = mlp_out" if shared is None else "experts + shared_experts = mlp_out"
    if off_by(experts if shared is None else experts + shared, out) is None:
        places.passed.update(dict.fromkeys([part for part in ("experts", "shared_experts") if places.has(part)], text))
    told = [seen.part(places, part) for part in TOLD]
    if "experts" in places.roles and all(one is not None for one in told):
        _check_each_expert(seen, places, [one for one in told if one is not None], experts)


def _check_each_expert(seen: Seen, places: PartPlaces, told: list[Tensor], experts: Tensor) -> None:
    paths = [str(places.path(part, seen.now)) for part in TOLD]
    try:
        with torch.no_grad():
            wrong = off_by(each_choice(seen.names[places.roles["experts"]], paths, told).sum(2), experts)
    except Exception as error:  # whatever a module raises that takes something else
        wrong = f"{type(error).__name__}, when it is told of one choice alone"
    if wrong is None:
        places.passed.update(dict.fromkeys(TOLD, "each expert alone, added up = experts"))
    else:
        places.refuse(
            "experts_in", FAILED.format(reason=f"each expert alone, added up, is off from experts by {wrong}")
        )


def _check_ends(seen: Seen, layout: Layout, output: Any) -> None:
    last = seen.at(layout.layers[-1].gives)
    normed = last
    if "final_norm" in layout.roles and last is not None:
        made, came = seen.run(layout.roles["final_norm"], last), seen.single(layout, "final_norm")
        if made is None or came is None or off_by(made, came) is not None:
            layout.singles["final_norm"] = Lacks(FAILED.format(reason="it does not read what the last layer gives"))
        else:
            layout.passed["final_norm"] = "final_norm(resid_post[-1])"
        normed = came
    logits = seen.single(layout, "logits")
    if logits is None or normed is None or "unembed" not in layout.roles:
        return
    made = _logits_from(seen, layout, normed)
    if made is not None and off_by(made, logits) is None:
        layout.passed["logits"] = "unembed(final_norm)"
    else:
        layout.roles.pop("unembed")


def _logits_from(seen: Seen, layout: Layout, normed: Tensor) -> Tensor | None:
    if "before_unembed" in layout.roles:
        through = seen.run(layout.roles["before_unembed"], normed)
        if through is None:
            return None
        normed = through
    made = seen.unembedded(layout.roles["unembed"], normed)
    return None if made is None else layout.head.of(made)


CHECKED = "on a short forward"

NOT_COMPARED = (
    "what is added before it was checked on a short forward, and is not what its name says: nothing shows that this is"
)

NEXT_READS = "it is what the next layer reads"

NO_CHAIN = (
    "nothing shows that it is the stream: what the layer gives is no sum of what it reads and of what is computed in "
    "it, and it is not what the next layer reads"
)

NOT_SEEN = "its place {path!r} was not reached in a short forward"

FAILED = "it was checked on a short forward, and is not what its name says: {reason}"
