"""The pages for who moves over: each row says how it is here, and has a test that shows it."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from gallery.mixed import Coder, Idle
from gallery.toy import inputs, toy
from transformers import GPT2Config, GPT2LMHeadModel

import nicehooks
from nicehooks import ablate, anatomy, capture, describe, edit, grad_at, head_results, patch, steer
from nicehooks.hookpoints import HookCheckFailed, HookCheckWarning, auto_hook, check_auto_hook, hooked
from nicehooks.hooktrees import AtLayers, HookCollection, Hooks, TransformerHooks

ROOT = Path(__file__).parent.parent.parent
SYSTEMS = ("auto_hookpoint", "nice_hooks", "transformer_debugger", "transformer_lens", "nnsight", "pyvene", "baukit")
"""The library has the surfaces of the first four; of the others it says what was called what."""

PAGES = {system: (ROOT / "docs" / f"from_{system}.md").read_text() for system in SYSTEMS}

# --- what has to be shown ---------------------------------------------------------------------------------------------

VERDICT = re.compile(r"\bthe same\b|\bmore: |\bdifferent on purpose, because ")

OF_THIS_LIBRARY_ALONE = {"function", "path", "place"}
"""How the tables begin that compare nothing."""

SECTIONS = {"What is different", "What is different on purpose", "What works here in addition"}
"""Where each paragraph begins with what it says; so do the items of the list below."""
FAULTS = "Faults that did not come along"


def tables(page: str) -> Iterator[list[list[str]]]:
    """The rows of each table, the first of which says what is in the columns."""
    for found in re.finditer(r"^\|.*\n\|[-| :]+\|\n(?:\|.*\n)+", page, re.MULTILINE):
        lines = found[0].splitlines()
        yield [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], *lines[2:])]


def rows(page: str) -> list[list[str]]:
    return [row for first, *rows in tables(page) if first[0] not in OF_THIS_LIBRARY_ALONE for row in rows]


def claims(page: str) -> Iterator[str]:
    """The paragraphs that begin in bold, in the sections about what is different."""
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        if heading in SECTIONS or heading == FAULTS:
            yield from re.findall(r"^(?:- )?\*\*(.+?)\*\*", section, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_row_says_the_same_or_more_or_different_on_purpose(page: str) -> None:
    assert [row[0] for row in rows(PAGES[page]) if not VERDICT.search(" ".join(row[1:]))] == []
    assert len(rows(PAGES[page])) >= 10


@pytest.mark.parametrize("page", PAGES)
def test_every_row_has_a_test_and_every_test_a_row(page: str) -> None:
    shown = [*(row[0] for row in rows(PAGES[page])), *claims(PAGES[page])]
    assert sorted(shown) == sorted(PROOFS[page])


@cache
def cases_in(file: str) -> set[str]:
    functions = ast.parse((ROOT / "tests" / file).read_text()).body
    return {node.name for node in functions if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_are_there(page: str) -> None:
    for proofs in PROOFS[page].values():
        assert proofs
        for proof in proofs.split():
            file, _, name = proof.partition("::")
            assert f"test_{name}" in cases_in(f"{FILES.get(file, f'compat/test_{file}')}.py"), proof


@pytest.mark.parametrize("page", ["nnsight", "pyvene", "transformer_lens"])
def test_every_row_is_run_beside_that_library_or_says_why_not(page: str) -> None:
    """By `make test-peers`, which has the libraries."""
    file = ROOT / "benchmarks" / "peers" / f"moved_from_{page}.py"
    texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
    assert [row[0] for row in rows(PAGES[page]) if row[0] not in texts] == []


FILES = {"methods": "core/test_methods", "cuda": "core/test_cuda"}
"""Where a test of another room is."""

# --- the rows of each page, and the tests that show them --------------------------------------------------------------

NICE_HOOKS = {
    "`run(model, *args, **kwargs)`": "running::without_options_it_is_a_call "
    "from_nice_hooks::none_is_a_left_out_option_everywhere running::options_that_the_model_wants_too",
    "`return_activations=True`, or paths": "running::all_activations_are_those_of_capture running::some_activations",
    "`with_activations={path: value}`": "running::activations_replace_those_of_the_model",
    "`forward_hooks=`, `forward_pre_hooks=`, `full_backward_hooks=`, `full_backward_pre_hooks=`": (
        "running::every_kind_of_hook_acts_in_this_run_alone moving_over::an_option_takes_one_hook_or_a_list"
    ),
    "`register_forward_hook` and its three siblings": "registered_hooks::a_hook_is_called_as_pytorch_calls_its_own "
    "registered_hooks::a_subscript_shows_and_changes_its_part_alone registered_hooks::subscripts_of_gradients",
    "`handle.remove()`, `handle.handles`": "from_nice_hooks::a_handle_has_one_handle_for_each_module "
    "from_nice_hooks::handles_of_hooks_on_gradients registered_hooks::handles_in_any_order_and_after_errors",
    "`ModulePath(name, index)`, `name, index = path`, `path.slice`": "from_nice_hooks::a_path_is_a_name_and_an_index "
    "from_nice_hooks::an_index_may_have_a_star_or_be_no_tuple",
    "`expand_module_path(model, path)`": "running::the_paths_that_a_pattern_selects "
    "from_nice_hooks::the_root_and_its_children",
    '`"*"`': "from_nice_hooks::the_root_and_its_children",
    "`ActivationCache`, `ActivationCacheLike`": "moving_over::a_cache_is_a_dict_and_a_dict_will_do",
    "`AnySlice`, `PathsLike`, `to_paths`, `RemovableHandleCollection`": "from_nice_hooks::the_type_names_are_public",
    "`patch_method_to_module`": "methods::what_is_listed methods::nothing_of_the_model_changes_and_nothing_recurses "
    "methods::two_handles_of_one_method",
    "A wrong name beside a good one": "from_nice_hooks::a_wrong_name_beside_a_good_one_is_not_dropped",
    "`[*]` and slices": "from_nice_hooks::wildcards_and_slices_of_an_index_write_their_part_alone",
    "Hooks do not survive an error.": "from_nice_hooks::hooks_do_not_survive_an_error",
    "A site that the run never came by": "from_nice_hooks::a_patch_that_did_nothing_does_not_pass",
    "In-place layers": "from_nice_hooks::layers_in_place_behind_a_hook_on_gradients",
    "Transforms and compiled code": "hooks_compiled::hooks_in_compiled_code "
    "hooks_compiled::hooks_on_gradients_in_transforms_equal_one_example_at_a_time "
    "hooks_compiled::a_full_backward_hook_in_compiled_code_is_refused",
    "Other threads": "running::hooks_act_in_the_thread_of_the_run_alone",
}

TRANSFORMER_LENS = {
    "`hook_embed`, `blocks.1.hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`, `hook_attn_out`, `hook_mlp_out`": (
        "canonical_names::every_name_is_the_part_of_the_anatomy canonical_names::gradients_at_these_names"
    ),
    "`blocks.1.attn.hook_q`, `hook_k`, `hook_v`, `hook_z`, `hook_attn_scores`, `hook_pattern`": (
        "canonical_names::every_name_is_the_part_of_the_anatomy canonical_names::shapes_are_those_of_transformer_lens"
    ),
    "`blocks.1.mlp.hook_pre`, `hook_post`": "canonical_names::every_name_is_the_part_of_the_anatomy",
    "`hook_pos_embed`": "canonical_names::the_norms_and_positions",
    "`blocks.1.ln1.hook_normalized`, `ln2`, `ln_final.hook_normalized`": "canonical_names::the_norms_and_positions "
    "canonical_names::a_name_that_the_model_lacks_says_why",
    "`hook_scale`, `attn.hook_result`, `hook_q_input`, …": "moving_over::results_of_heads_are_computed_from_z",
    "gradients at `hook_pattern`, `hook_attn_scores`, `hook_resid_mid`": (
        "canonical_names::a_gradient_inside_a_module_is_refused moving_over::these_names_have_no_gradient"
    ),
    '`"resid_post"`, `parts.z[1]`, `"transformer.h.*[:, -1]"`': "canonical_names::parts_and_paths_are_names_too",
    "`model.run_with_cache(x, names_filter=h)`": "moving_over::a_cache_by_name_or_by_path",
    '`model.run_with_cache(x, names_filter=lambda name: "mlp" in name)`': "moving_over::a_cache_by_predicate",
    "`pos_slice=-1`": "moving_over::a_position",
    "`incl_bwd=True`": "moving_over::gradients",
    "`model.run_with_hooks(x, fwd_hooks=[(h, fn)])`": "moving_over::a_hook_is_an_edit",
    "a hook that returns zeros; that adds a vector; that puts another run's value": "moving_over::the_usual_edits",
    "`bwd_hooks=[(h, fn)]`": "moving_over::a_hook_on_a_gradient_is_an_edit_of_it",
    "`model.add_hook(h, fn)`, `model.reset_hooks()`": "moving_over::hooks_that_stay",
    "`model.list_hooks()`": "moving_over::hooks_that_stay",
    "Transforms.": "hooks_in_worlds::hooks_act_in_every_world hooks_in_worlds::a_gradient_per_example",
    "Compile.": "hooks_in_worlds::a_compiled_model_sees_hooks_and_compiles_nothing_again "
    "hook_faults::hooks_are_not_entered_inside_one_compiled_graph",
    "Threads.": "hooks_in_worlds::scoped_hooks_act_in_their_own_thread_and_attached_ones_everywhere",
    "Copies.": "hooks_in_worlds::copies_are_clean_models hooks_in_worlds::a_saved_model_with_hooks_is_loaded_without",
    "Gradients through caches.": "hooks_in_worlds::gradients_flow_through_a_cache hooks_by_name::device_and_detach",
    "A wrong name is an error": "hook_faults::a_wrong_name_beside_a_good_one_is_an_error_that_names_the_nearest "
    "hook_faults::a_filter_that_matches_nothing_is_an_error",
    "Helpers undo their own work alone.": "hook_faults::temporary_helpers_leave_the_hooks_of_others",
    "A gradient hook stands in one line with the others.": (
        "hook_point::a_backward_hook_sees_the_use_at_its_point_alone moving_over::a_gradient_hook_stands_in_line"
    ),
    "`context_level` and `is_caching` are looked up": (
        "autohook::what_transformer_lens_has_as_attributes_can_be_assigned"
    ),
    "`remove_batch_dim=True` takes one example.": "hooks_by_name::remove_batch_dim",
    "Hooks that a call has begun with have their turn in it": (
        "hook_faults::hooks_that_are_removed_in_a_call_have_their_turn_in_it"
    ),
    "Nothing survives an error": "hooks_by_name::hooks_that_are_to_stay_do_not_after_an_error "
    "hook_faults::no_hook_survives_an_error",
    "The model is called, not its `forward`": "hook_faults::the_models_own_hooks_fire",
    "`incl_bwd=True` is never handed to the model": (
        "hook_faults::incl_bwd_is_not_swallowed_by_a_model_that_takes_anything hook_faults::incl_bwd_needs_a_scalar"
    ),
    "The `bwd_hooks` of `run_with_hooks` act in the backward of what it computed": (
        "hook_faults::backward_hooks_of_a_run_act_in_the_backward_after_it_and_in_no_other "
        "hook_faults::backward_hooks_of_a_run_are_held_by_its_graph_and_by_nothing_else "
        "hook_faults::backward_hooks_of_a_run_that_no_backward_can_reach_are_an_error"
    ),
    "A hook assigns.": "hook_point::what_a_hook_returns_is_assigned_and_hooks_act_in_order "
    "hook_point::a_value_that_does_not_fit_is_an_error_that_names_the_point",
    "A cached value that the model overwrites in place afterwards raises": (
        "hooked_models::a_cached_value_that_is_overwritten_says_so hook_faults::caches_may_keep_copies"
    ),
    "`fwd_hooks` and `bwd_hooks` of a point are lists of what acts here and now": (
        "moving_over::the_lists_of_a_point_are_looked_up"
    ),
}

AUTO_HOOKPOINT = {
    "`from Auto_HookPoint import auto_hook, check_auto_hook`": "moving_over::a_class_and_a_model_stay_what_they_are",
    "`@auto_hook` on a class · `auto_hook(model)`": "autohook::a_decorated_class_is_the_same_class "
    "autohook::an_instance_keeps_everything moving_over::a_class_and_a_model_stay_what_they_are",
    "`hook_point` · `fc1.hook_point` · `W_enc.hook_point`": (
        "autohook::an_autoencoder_has_its_parameters_as_hook_points moving_over::hook_points_are_paths_too"
    ),
    "`model.hook_dict`, `model.mod_dict`, `model.hook_points()`": (
        "autohook::hook_points_in_order_and_how_they_are_shown"
    ),
    "`run_with_hooks`, `run_with_cache`, `hooks`, `add_hook`, `add_perma_hook`, `reset_hooks`, …": (
        "autohook::the_same_as_hook_points_written_by_hand autohook::run_with_cache_and_with_hooks "
        "autohook::added_hooks_stay_until_they_are_reset"
    ),
    "a hook `fn(value, hook)` with `hook.name`, `hook.ctx`": "autohook::hooks_are_told_their_point",
    "a module that returns a tuple: hooks get its first item": (
        "auto_hook_points::hooks_get_the_first_item_of_a_tuple_and_put_it_back"
    ),
    "a `HookPoint` that was written by hand keeps its name": (
        "auto_hook_points::hook_points_written_by_hand_are_the_models_own"
    ),
    "`auto_hook(parameter)`": "auto_hook_points::a_parameter_stays_as_it_is",
    "`check_auto_hook(cls, input_kwargs, init_kwargs, strict=False)`": "hook_checks::a_good_class_passes "
    "hook_checks::a_good_instance_passes_and_is_left_alone",
    "`strict=True`: a `RuntimeError` · else a warning": "hook_checks::strict_raises_an_error_that_is_a_runtime_error "
    "moving_over::the_check_raises_or_warns",
    "the plain model again": "autohook::an_instance_is_unwrapped autohook::a_class_is_unwrapped",
    "The model stays what it is.": "autohook::an_instance_keeps_everything "
    "autohook::copies_have_points_of_their_own_and_no_hooks",
    "A method of a decorated class keeps its model alive": (
        "autohook::a_method_of_a_class_keeps_its_model_alive_and_that_of_an_instance_says_what_to_write"
    ),
    "Nothing is replaced.": "autohook::names_that_are_taken_are_not_replaced",
    "Hooks on a module that returns a tuple get its first item": (
        "auto_hook_points::hooks_get_the_first_item_of_a_tuple_and_put_it_back "
        "autohook::backward_hooks_get_the_gradient_of_the_first_item_of_a_tuple"
    ),
    "The check says what is wrong, and where.": "hook_checks::a_bad_model_is_told_by_the_check_and_the_hook_point",
    "Contexts end where they end.": "autohook::wrong_names_and_hooks_that_never_act_are_said",
}

TRANSFORMER_DEBUGGER = {
    "run with hooks": "hooktrees_on_models::an_edit_of_any_place_has_the_effect_that_it_has_by_hand "
    "hooktrees_laws::leaving_undoes_everything_also_after_an_exception",
    "a hook on a value": "hooktrees::hooks_are_called_in_order_with_all_arguments "
    "hooktrees_on_models::each_place_is_seen_once_in_each_layer_with_the_right_value",
    "by path": "hooktrees::a_path_and_attributes_lead_to_the_same_place",
    "everywhere": "hooktrees::append_all_reaches_every_list",
    "keywords": "hooktrees::a_keyword_is_bound_once hooktrees::hooks_are_called_in_order_with_all_arguments",
    "a hook on a gradient": "hooktrees_on_models::the_gradient_at_any_place_is_that_of_autograd "
    "hooktrees_never_silent::a_gradient_that_does_not_come_is_an_error_on_leaving",
    "a hook after it": "hooktrees::fwd_then_bwd_then_fwd2_in_whatever_order_they_are_appended",
    "a gradient in the middle of `fwd`": "hooktrees_never_silent::one_gradient_can_be_asked_for_in_the_middle_of_fwd",
    "in some layers": "hooktrees::at_layers "
    "hooktrees_never_silent::layers_that_the_model_does_not_have_are_an_error_on_entry",
    "the layer": "moving_over::the_layer_is_given_in_each_call hooktrees_laws::two_threads_have_a_tree_of_their_own",
    "queries, keys, scores, patterns": "moving_over::queries_keys_scores_and_patterns_are_as_there",
    "copies": "moving_over::copies_of_a_condition_are_equal",
    "a tree with numbers": "moving_over::a_tree_may_have_numbers",
    "an autoencoder": "hooktrees::an_autoencoder_reconstructs hooktrees_laws::an_autoencoder_is_a_hook_at_a_place",
    "a hook that only looks": "hooktrees::a_hook_that_returns_none_leaves_the_value",
    "models": "hooktrees_on_models::each_place_is_seen_once_in_each_layer_with_the_right_value",
    "in threads, transforms, compiled code": "hooktrees_laws::hooks_act_in_the_thread_that_entered "
    "hooktrees_laws::hooks_act_under_transforms_as_example_by_example "
    "hooktrees_laws::a_tree_acts_in_compiled_code_too_and_compiles_nothing_twice",
    "`WrapperHooks.append` returns `None`, so that calls do not chain": (
        "hooktrees::every_method_returns_what_it_was_called_on"
    ),
    "a hook that returns `None` makes the value, or the gradient, `None`": (
        "hooktrees::a_hook_that_returns_none_leaves_the_value "
        "hooktrees::a_gradient_hook_that_returns_none_leaves_the_gradient"
    ),
    "a deep copy of a collection whose class takes arguments fails, and loses further attributes": (
        "hooktrees::a_copy_has_hooks_of_its_own"
    ),
    "a list that hangs in two places is bound twice, and raises": (
        "hooktrees::a_list_that_hangs_in_two_places_is_bound_once"
    ),
    "a collection cannot be unpickled: `__getattr__` never ends": "hooktrees::a_copy_has_hooks_of_its_own",
    "`AtLayers` cannot be pickled": "hooktrees::a_copy_has_hooks_of_its_own",
    "`AtLayers` called without `layer` fails in a function that nobody wrote": (
        "hooktrees::at_layers hooktrees_never_silent::at_layers_at_a_place_without_layers_says_so"
    ),
    "a condition does not see the bound keywords": "hooktrees::a_condition_sees_what_a_hook_sees",
    "an unknown name in `append_to_path` is a bare `assert`; a path that ends too early, an `AttributeError`": (
        "hooktrees::a_path_that_leads_nowhere_says_what_there_is"
    ),
    "`append_all` takes an `AttributeError` in an `append` for a sign": (
        "hooktrees::append_all_does_not_swallow_errors"
    ),
    "`bind` that fails half-way has bound half": "hooktrees::binding_binds_all_or_nothing",
    "a gradient hook fails under `torch.func.grad` and `vmap`": (
        "hooktrees::a_gradient_hook_acts_in_every_kind_of_derivative "
        "hooktrees::a_gradient_hook_acts_in_second_derivatives"
    ),
    "an in-place layer behind a gradient hook fails": "hooktrees::a_gradient_hook_stands_before_an_in_place_layer",
    "an error of an autoencoder that nobody looks at is computed": (
        "hooktrees::an_error_that_nobody_looks_at_costs_nothing"
    ),
    "a reconstruction of another shape is broadcast": "hooktrees::what_comes_out_of_an_autoencoder_has_to_fit",
    "a subtree under a name that is a method cannot be reached": (
        "hooktrees::a_name_that_could_not_be_read_is_refused"
    ),
    "`add_subhooks` takes any object that has the methods of a tree": (
        "hooktrees::what_is_no_function_is_refused_at_once"
    ),
    "`AtLayers` of a layer that the model does not have does nothing": (
        "hooktrees_never_silent::layers_that_the_model_does_not_have_are_an_error_on_entry"
    ),
}

NNSIGHT = {
    '`model = TransformersModel("gpt2")`, or `NNsight(module)`': (
        "from_nnsight::the_module_is_taken_as_it_is_and_stays_so"
    ),
    "`with model.trace(ids): x = h[1].output.save()`": "from_nnsight::values_are_those_of_hooks_with_their_graph",
    "`h[1].attn.output[0].save()`": "from_nnsight::values_are_those_of_hooks_with_their_graph",
    "`h[1].input.save()`, `h[1].inputs`": "from_nnsight::inputs_are_those_of_a_hook",
    "a loop over `h` that saves each": "from_nnsight::values_are_those_of_hooks_with_their_graph",
    "`tracer.cache()`": "from_nnsight::values_are_those_of_hooks_with_their_graph",
    "`h[1].output[:, -1] = v`": "from_nnsight::changes_are_those_of_hooks_and_nothing_is_written_in_place",
    "`h[1].output = fn(h[1].output)`": "from_nnsight::changes_are_those_of_hooks_and_nothing_is_written_in_place",
    "`h[1].output[:] += v`": "from_nnsight::changes_are_those_of_hooks_and_nothing_is_written_in_place",
    "a value of one `invoke` put into another": (
        "from_nnsight::a_value_of_one_run_in_another_and_both_in_one_batch "
        "from_nnsight::a_run_that_does_not_come_by_is_an_error_and_waits_for_nothing"
    ),
    "`with tracer.invoke(a): …`, `with tracer.invoke(b): …`": "from_nnsight::invokes_are_a_batch_or_a_map_over_patches",
    "`with loss.backward(): g = h[1].output.grad.save()`": "from_nnsight::gradients_are_those_that_a_tensor_retains",
    "`h[1].attn.source.…output`": "from_nnsight::calls_inside_a_forward_have_paths_by_their_names",
    "`tracer.stop()`": "from_nnsight::stop_runs_nothing_behind_it",
    "`h[1].skip(value)`": "from_nnsight::a_module_whose_output_is_put_still_runs_and_is_seen_inside",
    "`with model.generate(…) as tracer: for step in tracer.iter[:3]: …`": "from_nnsight::steps_of_a_generation",
    "`with model.edit() as (tracer, edited): …`": "from_nnsight::an_edit_that_stays_is_a_handle_and_listed",
    "`with model.scan(ids): …shape`": "from_nnsight::shapes_without_a_context_and_the_models_own_print",
    "`print(model)`": "from_nnsight::shapes_without_a_context_and_the_models_own_print",
    "`remote=True` (NDIF), vLLM, diffusion pipelines": "from_nnsight::no_context_asks_where_a_model_runs",
    "Ordinary Python.": "from_nnsight::the_body_runs_once_line_by_line",
    "Any order of lines.": "from_nnsight::places_are_given_in_any_order_and_kept_in_that_of_the_model",
    "Transforms.": "from_nnsight::contexts_act_inside_transforms",
    "By the source, or by the call.": "from_nnsight::calls_inside_a_forward_have_paths_by_their_names",
}

PYVENE = {
    "`IntervenableModel(config, model)`": "from_pyvene::the_model_is_called_itself_and_returns_what_it_returns",
    '`{"layer": 1, "component": "block_output"}`': "from_pyvene::components_have_names",
    "`block_input` · `mlp_output` · `mlp_activation`": "from_pyvene::components_have_names",
    "`attention_output` · `attention_value_output`": "from_pyvene::components_have_names",
    "`head_attention_value_output`, with a head as unit": "from_pyvene::components_have_names",
    "`query_output` · `key_output` · `value_output`, `head_…`": "from_pyvene::components_have_names",
    '`component="h[1].attn.output"`, a string': "from_pyvene::any_module_is_a_component_by_its_path",
    '`unit="pos"` and `unit_locations={"sources->base": (…)}`': "from_pyvene::an_interchange_is_a_capture_and_a_patch",
    "`VanillaIntervention`, called with `base, [source]`": (
        "from_pyvene::what_a_source_run_gave_is_a_cache_that_is_patched"
    ),
    "`ZeroIntervention` · `AdditionIntervention`": "from_pyvene::zeros_sums_and_noise",
    "`NoiseIntervention`": "from_pyvene::zeros_sums_and_noise",
    "`CollectIntervention`": "from_pyvene::collected_values_are_those_of_hooks",
    "`intervention=lambda base, source: …`": "from_pyvene::a_function_closes_over_what_it_needs",
    "`source_representation=tensor`": "from_pyvene::zeros_sums_and_noise",
    "`RotatedSpaceIntervention`, `LowRankRotatedSpaceIntervention`": (
        "from_pyvene::a_rotation_is_learned_and_some_of_its_columns_are_used"
    ),
    "`subspaces=[…]`": (
        "from_pyvene::a_rotation_is_learned_and_some_of_its_columns_are_used "
        "from_pyvene::a_subspace_of_neurons_is_a_subscript"
    ),
    "several sources, parallel or serial": "from_pyvene::several_sources_parallel_and_serial",
    "`.generate(…, intervene_on_prompt=True)`": "from_pyvene::generation_on_the_prompt_and_on_the_rest",
    "`.save`, `.load`, sharing on a hub": "from_pyvene::values_are_saved_and_descriptions_are_code",
    "`CausalModel`, counterfactual data sets, `train_alignment`": (
        "from_pyvene::a_rotation_is_learned_and_some_of_its_columns_are_used"
    ),
    "The output is the model's.": "from_pyvene::the_model_is_called_itself_and_returns_what_it_returns",
    "A wrong place is an error": "from_pyvene::a_wrong_place_is_an_error_that_names_the_nearest",
    "Gradients are not switched off or on.": "from_pyvene::gradients_are_not_switched",
    "Any module.": "from_pyvene::any_module_has_paths",
}

BAUKIT = {
    '`with Trace(model, "1") as ret: model(x)`, then `ret.output`': "from_baukit::outputs_are_those_of_a_hook",
    '`TraceDict(model, ["1", "3"])`, then `ret["3"].output`': "from_baukit::outputs_are_those_of_a_hook",
    "`retain_input=True`, then `ret.input`": "from_baukit::inputs_are_those_of_a_hook_and_keywords_are_seen",
    "`retain_output=False`": "from_baukit::inputs_are_those_of_a_hook_and_keywords_are_seen",
    "`clone=True` · `detach=True`": "from_baukit::clone_and_detach_reach_into_what_a_module_returns",
    "`retain_grad=True`, then `ret.output.grad`": "from_baukit::the_gradient_is_that_which_a_tensor_retains",
    "`stop=True`": "from_baukit::stop_runs_that_far_and_the_block_goes_on",
    "`edit_output=fn`": "from_baukit::an_edit_is_a_hook_that_returns_a_value",
    "`edit_output=fn` with `fn(output, layer)`": "from_baukit::an_edit_is_a_hook_that_returns_a_value",
    "`fn` that returns zeros · adds a vector · puts another run's value": (
        "from_baukit::zeros_a_vector_and_another_runs_value"
    ),
    "`output[0][:, -1] = vector; return output`": "from_baukit::a_patch_of_a_part_writes_nothing_in_place",
    "`get_module(model, name)`": "from_baukit::names_are_those_of_the_modules",
    "`module_names(model)`": "from_baukit::names_are_those_of_the_modules",
    "`get_parameter(model, name)`, changed by hand and put back": (
        "from_baukit::a_weight_is_put_for_the_time_of_the_context_alone"
    ),
    '`subsequence(model, last_layer="1")`': "from_baukit::stop_runs_that_far_and_the_block_goes_on",
    "`replace_module(model, name, new)`": "from_baukit::values_go_through_a_module_that_is_spliced_in",
    "`runningstats`, `show`, `PlotWidget`, data sets": "from_baukit::the_tensors_of_a_cache_are_tensors",
    "Entering acts, not making.": "from_baukit::a_capture_acts_when_it_is_entered_and_again",
    "A wrong name is an error with the nearest names": (
        "from_baukit::a_wrong_name_and_a_module_that_never_ran_are_errors"
    ),
    "Only in this thread.": "from_baukit::a_context_acts_in_its_thread_alone",
    "`clone` and `detach` reach everywhere.": "from_baukit::clone_and_detach_reach_into_what_a_module_returns",
    "What the model overwrites raises.": "from_baukit::what_the_model_overwrites_raises",
    "Order.": "from_baukit::contexts_act_in_the_order_in_which_they_were_entered",
}

PROOFS = {
    "nice_hooks": NICE_HOOKS,
    "transformer_lens": TRANSFORMER_LENS,
    "auto_hookpoint": AUTO_HOOKPOINT,
    "transformer_debugger": TRANSFORMER_DEBUGGER,
    "nnsight": NNSIGHT,
    "pyvene": PYVENE,
    "baukit": BAUKIT,
}

# --- tests of rows that no other file has -----------------------------------------------------------------------------

# nice_hooks


def test_an_option_takes_one_hook_or_a_list() -> None:
    model, seen = toy(), []
    one = lambda module, path, args, output: seen.append(str(path))  # noqa: E731
    nicehooks.run(model, inputs(), forward_hooks={"embed": one, "unembed": [one, one]})
    assert seen == ["embed", "unembed", "unembed"]


def test_a_cache_is_a_dict_and_a_dict_will_do() -> None:
    model = toy()
    out, cache = nicehooks.run(model, inputs(), return_activations="embed")
    assert isinstance(cache, dict) and isinstance(cache, nicehooks.ActivationCache)
    assert {getattr(kind, "__origin__", kind) for kind in get_args(nicehooks.ActivationCacheLike)} > {Mapping}
    assert torch.equal(nicehooks.run(model, inputs(), with_activations=dict(cache)), out)
    assert torch.equal((cache + cache)["embed"], cache["embed"] * 2)


# TransformerLens: the same by a name and by a path

MLP_OUT = "blocks.0.hook_mlp_out"


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=30)).eval()


IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_results_of_heads_are_computed_from_z() -> None:
    model = gpt2()
    with pytest.raises(nicehooks.SiteNotFound, match=r"no hook point 'blocks.0.attn.hook_result'"):
        hooked(model).run_with_cache(IDS, names_filter="blocks.0.attn.hook_result")
    for name in ("blocks.0.ln1.hook_scale", "blocks.0.hook_q_input"):
        assert name not in hooked(model).hook_dict
    parts = anatomy(model)
    with capture(model, parts.z, parts.attn_out) as cache:
        model(IDS)
    results = head_results(model, cache, 0)
    bias = model.transformer.h[0].attn.c_proj.bias
    assert torch.allclose(results.sum(-2) + bias, cache[parts.attn_out[0]], atol=1e-6)


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores", "hook_resid_mid"])
def test_these_names_have_no_gradient(name: str) -> None:
    with pytest.raises(nicehooks.NiceHooksError):
        hooked(gpt2()).run_with_hooks(IDS, bwd_hooks=[(f"blocks.0.{name}", lambda grad, hook: None)])


def test_a_cache_by_name_or_by_path() -> None:
    model, x = toy(), inputs()
    out, cache = model.run_with_cache(x, names_filter=MLP_OUT)
    with capture(model, MLP_OUT) as acts:
        assert torch.equal(model(x), out)
    assert list(cache) == list(acts) and torch.equal(cache[MLP_OUT], acts[MLP_OUT])


def test_a_cache_by_predicate() -> None:
    model, x = toy(), inputs()
    _, cache = model.run_with_cache(x, names_filter=lambda name: "mlp" in name)
    with capture(model, "**.*mlp*") as acts, capture(model, lambda name, module: "hook_mlp" in name) as points:
        model(x)
    assert list(cache) == list(points) == [f"blocks.{i}.hook_mlp_out" for i in range(2)]
    assert all(torch.equal(cache[key], acts[key]) for key in cache)
    assert "blocks.0.mlp" in acts


def test_a_position() -> None:
    model, x = toy(), inputs()
    _, cache = model.run_with_cache(x, names_filter=MLP_OUT, pos_slice=-1)
    with capture(model, f"{MLP_OUT}[:, -1]", f"{MLP_OUT}[:, -1:]") as acts:
        model(x)
    assert cache[MLP_OUT].shape == (3, 1, 8) and acts[f"{MLP_OUT}[:, -1]"].shape == (3, 8)
    assert torch.equal(cache[MLP_OUT], acts[f"{MLP_OUT}[:, -1:]"])


def test_gradients() -> None:
    model, x = toy(), inputs()
    _, cache = model.run_with_cache(x, names_filter=MLP_OUT, incl_bwd=True, return_type="loss")
    with capture(model, f"{MLP_OUT}@grad") as acts:
        model(x, return_type="loss").backward()
    _, gradients = grad_at(model, MLP_OUT, lambda out: out.square().mean())(x)
    assert torch.equal(cache[f"{MLP_OUT}_grad"], acts[f"{MLP_OUT}@grad"])
    assert torch.allclose(gradients[MLP_OUT], acts[f"{MLP_OUT}@grad"])


def test_a_hook_is_an_edit() -> None:
    model, x = toy(), inputs()
    by_name = model.run_with_hooks(x, fwd_hooks=[(MLP_OUT, lambda value, hook: value * 3)])
    with edit(model, MLP_OUT, lambda value: value * 3):
        assert torch.equal(model(x), by_name)
    names: list[str] = []
    with edit(model, f"{MLP_OUT}[:, 0]", lambda value, site: names.append(str(site)), steps=0):
        model(x)
    assert names == [f"{MLP_OUT}[:, 0]"]


def test_the_usual_edits() -> None:
    model, x, vector = toy(), inputs(), torch.arange(8.0)
    _, other = model.run_with_cache(inputs() + 1, names_filter=MLP_OUT)
    for context, hook in (
        (ablate(model, MLP_OUT), lambda value, hook: value * 0),
        (steer(model, MLP_OUT, vector), lambda value, hook: value + vector),
        (patch(model, MLP_OUT, other[MLP_OUT]), lambda value, hook: other[hook.name]),
    ):
        expected = model.run_with_hooks(x, fwd_hooks=[(MLP_OUT, hook)])
        with context:
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)


def test_a_hook_on_a_gradient_is_an_edit_of_it() -> None:
    model, x = toy(), inputs()
    model.run_with_hooks(x, return_type="loss", bwd_hooks=[(MLP_OUT, lambda grad, hook: grad * 3)]).backward()
    expected, model.embed.weight.grad = model.embed.weight.grad, None
    with edit(model, f"{MLP_OUT}@grad", lambda gradient: gradient * 3):
        model(x, return_type="loss").backward()
    assert torch.equal(model.embed.weight.grad, expected)
    with pytest.raises(nicehooks.SiteNotReached, match="no gradient came by"):
        with edit(model, f"{MLP_OUT}@grad", lambda gradient: gradient * 3):
            model(x, return_type="loss")


def test_hooks_that_stay() -> None:
    model, x = toy(), inputs()
    clean = model(x)
    model.add_hook(MLP_OUT, lambda value, hook: value * 0)
    by_name = model(x)
    assert list(model.list_hooks()) == [MLP_OUT] and [record.path for record in describe(model)] == [MLP_OUT]
    model.reset_hooks()
    handle = edit(model, MLP_OUT, lambda value: value * 0).attach()
    assert torch.equal(model(x), by_name) and len(describe(model)) == 1
    handle.remove()
    assert torch.equal(model(x), clean) and not describe(model) and not model.list_hooks()


def test_a_gradient_hook_stands_in_line() -> None:
    model, seen = toy(), []
    for factor in (None, 0.0, None):
        if factor is None:
            model.add_hook(MLP_OUT, lambda grad, hook: seen.append(grad.any().item()), dir="bwd")
        else:
            model.add_hook(MLP_OUT, lambda value, hook, factor=factor: value * factor)
    model(inputs()).sum().backward()
    model.reset_hooks()
    assert seen == [True, False]  # the last comes first; the first sees what the edit has left of the gradient


def test_the_lists_of_a_point_are_looked_up() -> None:
    point = toy().hook_dict[MLP_OUT]
    point.add_hook(lambda value, hook: value * 2)
    point.add_hook(lambda grad, hook: grad * 2, dir="bwd")
    assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (1, 1)
    point.fwd_hooks.clear()
    assert len(point.fwd_hooks) == 1 and point(torch.ones(2)).tolist() == [2.0, 2.0]
    point.fwd_hooks[0].hook.remove()
    assert not point.fwd_hooks and point(torch.ones(2)).tolist() == [1.0, 1.0]
    point(torch.ones(2, requires_grad=True)).sum().backward()
    point.remove_hooks("both")
    assert not point.bwd_hooks


# Auto_HookPoint


def test_a_class_and_a_model_stay_what_they_are() -> None:
    class Own(Coder):
        pass

    model = Coder()
    assert auto_hook(Own) is Own and auto_hook(model) is model and type(model) is Coder
    assert Own().hook_dict.keys() == model.hook_dict.keys()


def test_hook_points_are_paths_too() -> None:
    model, x = auto_hook(Coder()), torch.randn(2, 4)
    _, cache = model.run_with_cache(x)
    with capture(model, "", "fc1", "@W_enc.uses()") as acts:
        model(x)
    for name, path in (("hook_point", ""), ("fc1.hook_point", "fc1"), ("W_enc.hook_point", "@W_enc.uses()")):
        assert torch.equal(cache[name], acts[path])


def test_the_check_raises_or_warns() -> None:
    with pytest.raises(RuntimeError, match=r"fc1.hook_point") as raised:
        check_auto_hook(Idle, {"x": torch.randn(2, 4)}, strict=True)
    assert isinstance(raised.value, HookCheckFailed)
    with pytest.warns(HookCheckWarning, match=r"fc1.hook_point"):
        assert not check_auto_hook(Idle, {"x": torch.randn(2, 4)}).ok


# transformer-debugger


def test_the_layer_is_given_in_each_call() -> None:
    model, hooks, seen = gpt2(), TransformerHooks(), []
    hooks.append_to_path("mlp.post_act.fwd", lambda value, layer: seen.append(layer))
    hooks.append_to_path("resid.post_emb.fwd", lambda value: seen.append("emb"))
    with hooks.on(model):
        model(IDS)
    assert seen == ["emb", 0, 1]
    assert hooks.mlp.post_act.fwd.bound_kwargs == {}  # nothing was bound meanwhile


def test_queries_keys_scores_and_patterns_are_as_there() -> None:
    model, hooks, seen = gpt2(), TransformerHooks(), {}
    for place in ("q", "k", "qk_logits", "qk_probs"):
        hooks.append_to_path(
            f"attn.{place}.fwd", lambda value, layer, place=place: seen.update({(place, layer): value})
        )
    parts = anatomy(model)
    with hooks.on(model), capture(model, parts.q, parts.k, parts.pattern) as acts:
        model(IDS)
    q, k, scores, pattern = (seen[name, 1] for name in ("q", "k", "qk_logits", "qk_probs"))
    assert q.shape == k.shape == (1, 5, 4, 4) and scores.shape == pattern.shape == (1, 5, 5, 4)
    assert torch.allclose(q, acts[parts.q[1]] * 4**-0.25) and torch.allclose(k, acts[parts.k[1]] * 4**-0.25)
    products = torch.einsum("bqhd,bkhd->bqkh", q, k)
    below = torch.ones(5, 5).tril().bool()
    assert torch.allclose(scores[:, below], products[:, below], atol=1e-5)
    assert torch.allclose(pattern, acts[parts.pattern[1]].permute(0, 2, 3, 1), atol=1e-6)
    assert torch.allclose(pattern.sum(2), torch.ones(1, 5, 4))


def test_copies_of_a_condition_are_equal() -> None:
    one = AtLayers([1, 3])
    assert copy.deepcopy(one).condition == one.condition == AtLayers([1, 3]).condition
    assert AtLayers(2).condition != one.condition


def test_a_tree_may_have_numbers() -> None:
    tree = HookCollection().add_subhooks(0, Hooks())
    tree.append_to_path("0", lambda x: x + 1)
    assert tree.all_hooks[0](1) == 2
