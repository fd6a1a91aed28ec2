"""nicehooks: look inside any PyTorch model, and change what happens there, through context managers.

The floors, from the ground up; each imports only from the ones below it:

    errors          what can go wrong, in words that teach
    internals       every touch of a private torch API
    trees           reading and rewriting a part of a nested value
    paths           the path language
    selection       which sites of a model a path selects
    sessions        who is active in which thread or task
    rebinding       the tap that stands in for a module's forward
    parameters      parameters with another value in one thread or task
    ports           how a value is reached: output, input, parameter
    contexts        what every intervention is: entered and left, never silent
    activations     ActivationCache
    interventions   capture, patch, edit, ablate, steer, suspend
    functional      captured
    listing         sites, describe
"""

from nicehooks.activations import ActivationCache
from nicehooks.errors import (
    CheckpointWarning,
    ContextMisuse,
    NiceHooksError,
    NiceHooksWarning,
    NotCalledWarning,
    NotCaptured,
    NotReachedWarning,
    PathError,
    SiteNotFound,
    SiteNotReached,
    StaleActivation,
    TreeMismatch,
    UnsupportedModule,
)
from nicehooks.functional import captured
from nicehooks.interventions import ablate, capture, edit, patch, steer, suspend
from nicehooks.listing import describe, sites
from nicehooks.paths import ModulePath
from nicehooks.selection import Site, select
from nicehooks.trees import KEEP

__version__ = "0.1.0"

__all__ = [
    "KEEP",
    "ActivationCache",
    "CheckpointWarning",
    "ContextMisuse",
    "ModulePath",
    "NiceHooksError",
    "NiceHooksWarning",
    "NotCalledWarning",
    "NotCaptured",
    "NotReachedWarning",
    "PathError",
    "Site",
    "SiteNotFound",
    "SiteNotReached",
    "StaleActivation",
    "TreeMismatch",
    "UnsupportedModule",
    "ablate",
    "capture",
    "captured",
    "describe",
    "edit",
    "patch",
    "select",
    "sites",
    "steer",
    "suspend",
]
