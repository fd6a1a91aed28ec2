"""`HookPoint`s: named places that a model shows by itself, and the same methods for models that have none.

points          HookPoint, and the methods of a place
hooked_methods  the methods of a model with hook points
hooked_models   HookedRootModule, hooked
autohook        auto_hook
hook_checks     check_auto_hook
"""

from nicehooks.autohook import auto_hook
from nicehooks.caching_hooks import CachingHook
from nicehooks.errors import HookCheckFailed, HookCheckWarning
from nicehooks.hook_checks import HookCheckReport, check_auto_hook
from nicehooks.hooked_methods import HookedMethods, HookRecord
from nicehooks.hooked_models import HookedModule, HookedRootModule, hooked
from nicehooks.hooks import LensHandle
from nicehooks.points import HookPoint, Place

__all__ = [
    "CachingHook",
    "HookCheckFailed",
    "HookCheckReport",
    "HookCheckWarning",
    "HookPoint",
    "HookRecord",
    "HookedMethods",
    "HookedModule",
    "HookedRootModule",
    "LensHandle",
    "Place",
    "auto_hook",
    "check_auto_hook",
    "hooked",
]
