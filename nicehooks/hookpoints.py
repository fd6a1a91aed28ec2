"""Hook points, from which everything about them is imported.

hooks           one hook, and hooks as an intervention
points          HookPoint, and the methods of a place
caching_hooks   the hook that fills a cache
named_points    hooks by name
hooked_methods  running with hooks, or with a cache
hooked_models   HookedRootModule, hooked
autohook        auto_hook
hook_reports    what check_auto_hook returns
hook_checks     check_auto_hook
"""

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
from nicehooks.public import __all__ as _  # noqa: F401  # so that what both hand out says where it belongs

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
