"""Hook points: the public names of two surfaces, from which everything about them is imported.

They come from `compat/transformer_lens` and `compat/auto_hookpoint`.
"""

import nicehooks.public  # noqa: F401  # first: what both hand out belongs to it
from nicehooks.compat.auto_hookpoint.auto_hook import auto_hook
from nicehooks.compat.auto_hookpoint.checks import check_auto_hook
from nicehooks.compat.auto_hookpoint.reports import HookCheckReport
from nicehooks.compat.transformer_lens.caching_hooks import CachingHook, NamesFilter
from nicehooks.compat.transformer_lens.canonical_names import get_act_name
from nicehooks.compat.transformer_lens.hook_point import HookPlace, HookPoint
from nicehooks.compat.transformer_lens.hooked_methods import HookedMethods
from nicehooks.compat.transformer_lens.hooked_models import HookedModule, HookedRootModule, hooked
from nicehooks.compat.transformer_lens.hooks import HookFunction, HookRecord, LensHandle
from nicehooks.compat.transformer_lens.hooks_by_name import HookIntrospectionMixin
from nicehooks.compat.transformer_lens.lens_cache import LensCache
from nicehooks.errors import HookCheckFailed, HookCheckWarning
from nicehooks.moved import belong_to

Place = HookPlace
"""Its first name, which old code and old pickles have."""

__all__ = [
    "CachingHook",
    "HookCheckFailed",
    "HookCheckReport",
    "HookCheckWarning",
    "HookFunction",
    "HookIntrospectionMixin",
    "HookPlace",
    "HookPoint",
    "HookRecord",
    "HookedMethods",
    "HookedModule",
    "HookedRootModule",
    "LensCache",
    "LensHandle",
    "NamesFilter",
    "Place",
    "auto_hook",
    "check_auto_hook",
    "get_act_name",
    "hooked",
]

belong_to(__name__, [globals()[name] for name in __all__])
