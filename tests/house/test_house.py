"""The house: its public names, what it imports and what it leaves alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest
from rooms import FILES, HOUSE, imports_of

import nicehooks

# --- names ------------------------------------------------------------------------------------------------------------


def test_these_are_the_public_names() -> None:
    assert nicehooks.__all__ == [
        "KEEP",
        "ActivationCache",
        "ActivationCacheLike",
        "ActivationStore",
        "AnySlice",
        "CheckpointWarning",
        "ContextMisuse",
        "Effects",
        "ModulePath",
        "NiceHooksError",
        "NiceHooksWarning",
        "NotCalledWarning",
        "NotCaptured",
        "NotReachedWarning",
        "PathError",
        "PathsLike",
        "RemovableHandleCollection",
        "Site",
        "SiteNotFound",
        "SiteNotReached",
        "StaleActivation",
        "TreeMismatch",
        "UnsupportedModule",
        "ablate",
        "acdc",
        "anatomy",
        "attention_view",
        "attribute",
        "capture",
        "captured",
        "circuit",
        "describe",
        "direct_logit_attribution",
        "edges",
        "edit",
        "expand_module_path",
        "expert_results",
        "faithfulness",
        "functional",
        "fused_attention_as_steps",
        "grad_at",
        "harvest",
        "head_results",
        "load_default",
        "load_sae",
        "logit_lens",
        "mean_activations",
        "on_the_fly",
        "patch",
        "patch_method_to_module",
        "probe",
        "register_anatomy",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "run",
        "score_attribution",
        "select",
        "serving",
        "sites",
        "splice",
        "steer",
        "steering_vector",
        "suspend",
        "sweep",
        "to_paths",
        "transcoder",
        "versions",
    ]


def test_the_package_shows_the_public_names_and_no_others() -> None:
    assert {name for name in dir(nicehooks) if not name.startswith("__")} == set(nicehooks.__all__)
    shown = in_a_new_python("import nicehooks; print([name for name in dir(nicehooks) if not name.startswith('__')])")
    assert ast.literal_eval(shown) == sorted(nicehooks.__all__)


def test_the_first_public_name_that_is_asked_for_loads_all_of_them() -> None:
    said = in_a_new_python(
        """
import sys, nicehooks
print("torch" in sys.modules, "capture" in vars(nicehooks))
nicehooks.KEEP
print("torch" in sys.modules, set(nicehooks.__all__) <= set(vars(nicehooks)))
"""
    )
    assert said == "False False\nTrue True\n"


@pytest.mark.parametrize(
    "first",
    [
        "from nicehooks import *; capture, patch, KEEP",
        "from nicehooks import capture, SiteNotFound",
        "import nicehooks; nicehooks.errors.SiteNotFound; nicehooks.hookpoints.HookPoint; nicehooks.hooktrees.AtLayers",
        "import nicehooks.anatomies.anatomy, nicehooks; nicehooks.anatomy(None) if 0 else nicehooks.anatomy.__name__",
    ],
)
def test_ways_to_import(first: str) -> None:
    assert in_a_new_python(first) == ""


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'nicehooks' has no attribute 'captur'"):
        _ = nicehooks.captur  # pyright: ignore
    with pytest.raises(ImportError, match="cannot import name 'captur' from 'nicehooks'"):
        from nicehooks import captur  # pyright: ignore # noqa: F401


def test_a_compiled_function_may_be_the_first_to_ask_for_a_name() -> None:
    said = in_a_new_python(
        """
import torch, nicehooks
from torch import nn
model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

@torch.compile(fullgraph=True, backend="eager")
def run(x):
    with nicehooks.capture(model, "0") as acts:
        model(x)
    return acts["0"]

x = torch.ones(1, 2)
print(torch.equal(run(x), model[0](x)))
"""
    )
    assert said == "True\n"


def test_a_look_at_what_the_command_can_do_does_not_wait_for_torch() -> None:
    said = in_a_new_python(
        """
import sys
from nicehooks.cli import command
try:
    command.main(["--version"])
except SystemExit as done:
    print(done.code, "torch" in sys.modules)
"""
    )
    assert said == f"nicehooks {nicehooks.__version__}\n0 False\n"


def test_the_version_is_that_of_the_package() -> None:
    pyproject = (HOUSE.parent / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"$', pyproject, re.MULTILINE) == [nicehooks.__version__]
    assert (HOUSE / "py.typed").exists()


def test_every_error_is_a_nicehooks_error_and_every_warning_a_nicehooks_warning() -> None:
    """But for the one that ends a forward early, which no `except Exception` of a model may catch."""
    strangers: set[str] = set()
    for info in pkgutil.walk_packages([str(HOUSE)], "nicehooks."):
        for name, thing in vars(importlib.import_module(info.name)).items():
            if (
                isinstance(thing, type)
                and issubclass(thing, BaseException)
                and thing.__module__.startswith("nicehooks")
            ):
                base = nicehooks.NiceHooksWarning if issubclass(thing, Warning) else nicehooks.NiceHooksError
                strangers |= set() if issubclass(thing, base) else {name}
    assert strangers == {"StopForward"}


ERRORS: list[tuple[type, type]] = [
    (nicehooks.PathError, ValueError),
    (nicehooks.SiteNotFound, LookupError),
    (nicehooks.NotCaptured, KeyError),
    (nicehooks.NotCaptured, nicehooks.SiteNotFound),
    (nicehooks.TreeMismatch, TypeError),
    (nicehooks.ContextMisuse, RuntimeError),
    (nicehooks.NiceHooksWarning, UserWarning),
]


@pytest.mark.parametrize(("ours", "pythons"), ERRORS, ids=[f"{ours.__name__}-{base.__name__}" for ours, base in ERRORS])
def test_errors_are_also_what_python_calls_them(ours: type, pythons: type) -> None:
    assert issubclass(ours, pythons)


# --- imports ----------------------------------------------------------------------------------------------------------


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a file that run when it is imported."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            yield from run_at_import(getattr(statement, inner, []))


@pytest.mark.parametrize("file", FILES)
def test_importing_a_file_needs_only_torch_and_optree(file: str) -> None:
    """Everything else is an extra, imported where it is used."""
    needed: set[str] = set()
    for statement in run_at_import(FILES[file].body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            needed |= {module.split(".")[0] for module, _ in imports_of(statement)}
    assert needed - set(sys.stdlib_module_names) <= {"torch", "optree", "nicehooks"}


def in_a_new_python(code: str) -> str:
    """What `code` prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_importing_the_package_loads_no_extra_and_no_compiler() -> None:
    heavy = [
        "transformers",
        "rich",
        "matplotlib",
        "safetensors",
        "gguf",
        "accelerate",
        "pandas",
        "torch._dynamo",
        "sympy",
    ]
    loaded = in_a_new_python(
        f"""
import sys, torch
before = set(sys.modules)
import nicehooks
nicehooks.capture
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    )
    assert loaded == "[]\n"


def test_importing_the_package_touches_nothing_of_python_or_torch() -> None:
    """No global is set, no class is changed, no thread is started, nothing is printed."""
    changed = in_a_new_python(
        """
import copyreg, logging, random, sys, threading, warnings
import torch, optree
from torch import nn

tables = [table for name, table in vars(nn.modules.module).items() if name.startswith("_global_")]

def globals_of_others():
    return {
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "filters": list(warnings.filters),
        "copyreg": dict(copyreg.dispatch_table),
        "loggers": logging.root.handlers[:],
        "random": random.getstate(),
        "seed": torch.initial_seed(),
        "rng": torch.get_rng_state().tolist(),
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        "classes": [dict(vars(kind)) for kind in (nn.Module, nn.Linear, torch.Tensor, nn.Parameter)],
        "global hooks": [dict(table) for table in tables if isinstance(table, dict)],
        "threads": threading.active_count(),
    }

before = globals_of_others()
import nicehooks
nicehooks.capture
after = globals_of_others()
print([name for name in before if before[name] != after[name]])
"""
    )
    assert changed == "[]\n"


# --- private APIs -----------------------------------------------------------------------------------------------------


def is_private(dotted: str) -> bool:
    """Whether a part of a dotted name begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Everything in a file that reads `torch.….…`, `nn.….…` or `optree.….…`, imports included."""
    for module, name in imports_of(tree):
        if module.split(".")[0] in ("torch", "optree"):
            yield f"{module}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"(torch|nn|optree)\.", ast.unparse(node)):
            yield ast.unparse(node)


OWNERS = ("torch_private", "torch_private_tensors")
"""The files that own every touch of a private API of torch: what the core asks, and what works on tensors."""


@pytest.mark.parametrize("file", [file for file in FILES if file not in OWNERS])
def test_private_apis_of_torch_are_touched_by_their_owners_alone(file: str) -> None:
    assert sorted({name for name in dotted_names(FILES[file]) if is_private(name)}) == []


def test_these_files_do_touch_them() -> None:
    """So that the test above looks for what there is."""
    private = {name for owner in OWNERS for name in dotted_names(FILES[owner]) if is_private(name)}
    assert {"torch._C._functorch", "torch.utils._pytree."} <= private


@cache
def names_of_our_own() -> set[str]:
    """Every name that a file of the house gives to something."""
    own: set[str] = set()
    for node in (node for tree in FILES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    slots = [ast.literal_eval(n.value) for t in FILES.values() for n in ast.walk(t) if _is_slots(n)]  # type: ignore[attr-defined]
    return own.union(*slots)


def _is_slots(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__slots__"]


TABLES = {"_modules", "_parameters", "_buffers"}
"""The tables of an `nn.Module`, which it has had under these names in every version."""


@pytest.mark.parametrize("file", [file for file in FILES if file not in OWNERS])
def test_private_attributes_of_others_are_read_in_that_file_alone(file: str) -> None:
    """Of tensors and modules, that is; what begins so in a named tuple is public."""
    public = {"_asdict", "_fields", "_make", "_replace"} | TABLES
    public |= {"_true_initial_tokens"} if file == "servers.engine" else set()  # of the engine's own requests
    private = {node.attr for node in ast.walk(FILES[file]) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    assert sorted(private - names_of_our_own() - public) == []
