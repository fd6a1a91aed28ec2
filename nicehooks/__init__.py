"""nicehooks: look inside any PyTorch model, and change what happens there, through context managers.

The floors, from the ground up; each imports only from the ones below it:

    errors          what can go wrong, in words that teach
    internals       every touch of a private torch API
    containers      what a nested value is made of
    regions         the region of a tensor that a subscript names
    trees           reading, rewriting and assigning a part of a nested value
    subscripts      the subscripts at the end of a path
    paths           the path language
    sessions        who is active in which thread or task
    methods         methods of classes as modules
    selection       which sites of a model a path selects
    rebinding       the tap that stands in for a module's forward
    parameters      parameters with another value in one thread or task
    steps           at which steps and calls an intervention acts
    rules           how the value at a site gets to an intervention, and back
    signatures      the parameters of any function, also of one in C
    arguments       the port @input
    weights         the ports of parameters and buffers
    tickets         how the backward of compiled code comes back to a context
    stations        where what acts on the gradients of one call's tensors stands in line
    gradients       the ports @grad and @input.grad
    attention       fused attention in its steps
    calls           the port @name(): calls inside a module
    uses            the port @weight.uses(): what a parameter enters
    ports           which rules reach a site
    tracing         entering a context inside compiled code
    contexts        what every intervention is: entered and left, never silent
    seen            what was seen at a site, and whether it was overwritten since
    parts           which parts of a captured value a path selects
    choosing        which keys of a cache something selects
    arithmetic      arithmetic of nested values
    activation_files  activations in safetensors files
    activations     ActivationCache
    given           the functions that users hand in, and how what they wrote is shown
    capturing       capture
    interventions   patch, edit, ablate, steer, splice, suspend
    hook_rules      hooks before and after a forward
    backward_hooks  hooks on gradients
    registering     register_forward_hook and its three siblings
    running         run, expand_module_path
    functional      captured, functional
    differentiating  grad_at
    listing         sites, describe
    anatomy_parts   a part of a transformer, and the same part of every layer
    anatomy_tables  where each family of transformers keeps its parts
    anatomy_finding  which table describes a model
    anatomy_linear  what is linear between the residual stream and the logits
    lenses          logit_lens, direct_logit_attribution, head_results
    anatomy         anatomy, register_anatomy
    normalizing     a norm in its steps
    gradient_hooks  hooks on gradients as hooks on values
    hooklists       Hooks, and those that act only sometimes
    hookcollections  trees of hooks
    autoencoder_hooks  an autoencoder in the place of a value
    hookplaces      where the places of a tree of hooks are in a model
    hookbinding     the context that binds a tree of hooks to a model
    hooktrees       TransformerHooks, and the names of all of these
    hooks           functions fn(value, hook=point) as one intervention, and the levels of contexts
    points          HookPoint, and the methods of a place
    caching_hooks   which hook points to cache, and the hook that does it
    named_points    hooks by name: listed, added and removed
    hooked_methods  running a model with hooks, or with a cache
    hooked_models   HookedRootModule, hooked
    autopoints      the hook points that auto_hook makes
    autohook        auto_hook
    hook_reports    what check_auto_hook returns
    hook_checks     check_auto_hook
    hookpoints      what of this is public
"""

from nicehooks.anatomies.anatomy import anatomy, register_anatomy
from nicehooks.anatomies.lenses import direct_logit_attribution, head_results, logit_lens
from nicehooks.caches.cache import ActivationCache
from nicehooks.compat.nice_hooks.registering import (
    register_forward_hook,
    register_forward_pre_hook,
    register_full_backward_hook,
    register_full_backward_pre_hook,
)
from nicehooks.compat.nice_hooks.running import ActivationCacheLike, expand_module_path, run
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.changes import ablate, edit, patch, splice, steer, suspend
from nicehooks.contexts.differentiating import grad_at
from nicehooks.contexts.functions import captured, functional
from nicehooks.contexts.listing import describe, sites
from nicehooks.core.methods import patch_method_to_module
from nicehooks.core.selection import Site, select
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
from nicehooks.old_addresses import keep_old_addresses
from nicehooks.paths.grammar import ModulePath
from nicehooks.ports.attention import fused_attention_as_steps
from nicehooks.values.trees import KEEP

__version__ = "0.1.0"

keep_old_addresses()
del keep_old_addresses

__all__ = [
    "KEEP",
    "ActivationCache",
    "ActivationCacheLike",
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
    "anatomy",
    "capture",
    "captured",
    "describe",
    "direct_logit_attribution",
    "edit",
    "expand_module_path",
    "functional",
    "fused_attention_as_steps",
    "grad_at",
    "head_results",
    "logit_lens",
    "patch",
    "patch_method_to_module",
    "register_anatomy",
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "run",
    "select",
    "sites",
    "splice",
    "steer",
    "suspend",
]
