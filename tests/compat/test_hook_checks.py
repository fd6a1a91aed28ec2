"""check_auto_hook: that it passes what is well, and says what is not, by the check and the hook point."""

from __future__ import annotations

import copy

import pytest
import torch
from gallery.faulty import (
    Base,
    Bends,
    Copies,
    Counts,
    Detaches,
    Drops,
    Lists,
    Noisy,
    Peeks,
    Rebinds,
    Refuses,
    Remembers,
    Unused,
)
from gallery.hooked import Count, Decorated, ReturnsAllSorts
from gallery.parameters import Autoencoder
from point_hooks import records
from worlds import inputs, state

from nicehooks.errors import NiceHooksError
from nicehooks.hookpoints import (
    HookCheckFailed,
    HookCheckWarning,
    auto_hook,
    check_auto_hook,
)

CHECKS = ("repeatable", "structure", "output", "forward", "backward", "gradients", "edits", "restored", "copies")


def found(model, **init):
    """The check and the hook point of each failure."""
    with pytest.warns(HookCheckWarning):
        report = check_auto_hook(model, {"x": inputs()}, init)
    assert not report.ok and all(failure.says in str(report) for failure in report.failures)
    return {(check, point) for check, point, _ in report.failures}


# --- good models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Decorated, Autoencoder, Noisy, ReturnsAllSorts], ids=lambda model: model.__name__)
def test_a_good_class_passes(model):
    random = torch.get_rng_state()
    report = check_auto_hook(model, {"x": inputs()}, strict=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.ok and report.failures == () and report.checks == (*CHECKS, "unwrap")
    assert report.hook_points == tuple(auto_hook(model()).hook_dict) and report.notes == ()
    assert str(report).startswith(f"{model.__name__}: 10 checks passed at {len(report.hook_points)} hook points")


@pytest.mark.parametrize("make", [Decorated, Autoencoder, Noisy, lambda: auto_hook(Autoencoder())])
def test_a_good_instance_passes_and_is_left_alone(make):
    model = make()
    before, random = state(model), torch.get_rng_state()
    assert check_auto_hook(model, {"x": inputs()}, strict=True).ok
    assert state(model) == before and torch.equal(torch.get_rng_state(), random)


def test_hooks_on_the_instance_do_not_matter():
    model = auto_hook(Autoencoder())
    model.add_hook("hook_point", lambda value, hook: value * 0)
    assert check_auto_hook(model, {"x": inputs()}).ok
    assert len(records(model)) == 1


def test_init_kwargs_reach_the_class():
    report = check_auto_hook(Noisy, {"x": torch.randn(3, 7)}, {"width": 7, "p": 0.1})
    assert report.ok
    with pytest.raises(TypeError, match="nothing"):
        check_auto_hook(Noisy, {"x": inputs()}, {"nothing": 7})


def test_what_has_no_gradient_is_listed():
    report = check_auto_hook(ReturnsAllSorts, {"x": inputs()})
    assert report.without_gradient == ("nothing.hook_point", "count.hook_point")
    assert str(report).endswith("\n  no gradients at: nothing.hook_point, count.hook_point")


def test_a_model_without_any_gradient_passes():
    report = check_auto_hook(Count(), {"x": inputs()}, strict=True)
    assert report.without_gradient == report.hook_points == ("hook_point",)


def test_what_the_model_itself_cannot_do_is_a_note():
    class Local(Autoencoder):
        pass

    report = check_auto_hook(Local, {"x": inputs()}, strict=True)
    assert len(report.notes) == 1 and report.notes[0].startswith("copies by pickle: the model itself has none (")
    assert "\n  not checked: copies by pickle" in str(report)


def test_errors_of_the_model_are_the_callers():
    with pytest.raises(RuntimeError, match="size of tensor"):
        check_auto_hook(Autoencoder, {"x": torch.randn(2, 3)})
    with pytest.raises(TypeError, match=r"check_auto_hook takes a class of torch\.nn\.Modules"):
        check_auto_hook(dict, {"x": inputs()})


# --- bad ones, one for each check -------------------------------------------------------------------------------------


BAD = [
    (Counts, {("repeatable", "")}),
    (Lists, {("structure", "")}),
    (Peeks, {("output", "")}),
    (Unused, {("forward", "unused.hook_point"), ("forward", "idle.hook_point")}),
    (Detaches, {("backward", "fc.hook_point")}),
    (Bends, {("gradients", "")}),
    (Drops, {("edits", "fc.hook_point")}),
    (Refuses, {("edits", "fc.hook_point")}),
    (Rebinds, {("restored", "")}),
    (Copies, {("copies", "")}),
    (Remembers, {("unwrap", "")}),
]


@pytest.mark.parametrize(("model", "expected"), BAD, ids=[model.__name__ for model, _ in BAD])
def test_a_bad_model_is_told_by_the_check_and_the_hook_point(model, expected):
    torch.manual_seed(0)
    failures = found(model)
    assert expected <= failures
    also = {
        Counts: {"output", "gradients", "copies", "unwrap"},
        Peeks: {"gradients"},
        Rebinds: {"forward", "backward", "output", "edits", "unwrap"},
        Remembers: {"restored", "structure"},
    }
    assert {check for check, _ in failures - expected} <= also.get(model, set())
    decorated = auto_hook(type(model.__name__, (model,), {}))
    if model not in (Lists, Copies, Remembers):  # an instance of a decorated class has nothing that these could see
        assert expected <= found(decorated)


def test_what_has_changed_is_shown():
    with pytest.warns(HookCheckWarning, match=r"auto_hook changes state_dict: \+hook_dict, \+mod_dict, .*, …\."):
        check_auto_hook(Lists, {"x": inputs()})


def test_strict_raises_an_error_that_is_a_runtime_error():
    with pytest.raises(HookCheckFailed) as caught:
        check_auto_hook(Unused, {"x": inputs()}, strict=True)
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, NiceHooksError)
    assert str(caught.value) == (
        "Unused: 1 of 10 checks failed\n"
        "  forward at 'idle.hook_point': its hook is never called: the parameter enters no operation of torch in the"
        " forward of its module.\n"
        "  forward at 'unused.hook_point': its hook is never called: the forward does not call this module, with these"
        " inputs."
    )


def test_an_error_on_the_way_is_a_finding():
    class Stubborn(Base):
        def named_parameters(self, *args, **kwargs):
            if hasattr(self, "hook_dict"):
                raise ValueError("no hooks here")
            return super().named_parameters(*args, **kwargs)

    with pytest.warns(HookCheckWarning, match="structure: ValueError: no hooks here"):
        check_auto_hook(copy.deepcopy(Stubborn()), {"x": inputs()})
