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

from nicehooks.autohook import auto_hook
from nicehooks.caching_hooks import CachingHook, NamesFilter
from nicehooks.errors import HookCheckFailed, HookCheckWarning
from nicehooks.hook_checks import check_auto_hook
from nicehooks.hook_reports import HookCheckReport
from nicehooks.hooked_methods import HookedMethods
from nicehooks.hooked_models import HookedModule, HookedRootModule, hooked
from nicehooks.hooks import HookFunction, LensHandle
from nicehooks.named_points import HookRecord
from nicehooks.points import HookPoint, Place

__all__ = [
    "CachingHook",
    "HookCheckFailed",
    "HookCheckReport",
    "HookCheckWarning",
    "HookFunction",
    "HookPoint",
    "HookRecord",
    "HookedMethods",
    "HookedModule",
    "HookedRootModule",
    "LensHandle",
    "NamesFilter",
    "Place",
    "auto_hook",
    "check_auto_hook",
    "hooked",
]
