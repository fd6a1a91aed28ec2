"""The public names, from which `nicehooks` takes them when the first is asked for.

Which they are, `nicehooks.__all__` says. What only the library makes, but may be in a pickle (`HANDED_OUT`), is found
here, too, whatever file it is in.
"""

# ruff: noqa: F401  # they are here to be handed out
from nicehooks import moved
from nicehooks.anatomies.anatomy import anatomy, register_anatomy
from nicehooks.anatomies.experts import expert_results
from nicehooks.anatomies.lenses import direct_logit_attribution, head_results, logit_lens
from nicehooks.anatomies.parts import Part, Parts
from nicehooks.autoencoders.autoencoder import Autoencoder
from nicehooks.autoencoders.sae_files import load_sae
from nicehooks.autoencoders.transcoding import transcoder
from nicehooks.caches.cache import ActivationCache
from nicehooks.caches.watching import Calls
from nicehooks.compat.nice_hooks.paths_like import AnySlice, PathsLike, to_paths
from nicehooks.compat.nice_hooks.registering import (
    RemovableHandleCollection,
    register_forward_hook,
    register_forward_pre_hook,
    register_full_backward_hook,
    register_full_backward_pre_hook,
)
from nicehooks.compat.nice_hooks.running import ActivationCacheLike, expand_module_path, run
from nicehooks.contexts.capturing import capture
from nicehooks.contexts.changes import ablate, edit, splice, steer
from nicehooks.contexts.differentiating import grad_at
from nicehooks.contexts.functions import captured, functional
from nicehooks.contexts.listing import ActiveRecord, ActiveTable, SiteRecord, SiteTable, describe, sites
from nicehooks.contexts.patching import patch
from nicehooks.contexts.suspending import suspend
from nicehooks.core.methods import patch_method_to_module
from nicehooks.core.selection import Site, select
from nicehooks.directions.contrasts import steering_vector
from nicehooks.directions.probing import Probe, probe
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
from nicehooks.experiments.attributing import attribute
from nicehooks.experiments.circuits import circuit
from nicehooks.experiments.edge_effects import edges
from nicehooks.experiments.effects import Axis, Effect, Effects
from nicehooks.experiments.faithful import faithfulness
from nicehooks.experiments.greedy import acdc
from nicehooks.experiments.means import mean_activations
from nicehooks.experiments.score_terms import score_attribution
from nicehooks.experiments.sweeping import sweep
from nicehooks.harvesting.activation_store import ActivationStore, StoredColumn
from nicehooks.harvesting.harvester import harvest
from nicehooks.harvesting.stored_rows import StoredRows
from nicehooks.harvesting.streaming import on_the_fly
from nicehooks.installed import versions
from nicehooks.models.shipped import load_default
from nicehooks.paths.grammar import ModulePath
from nicehooks.pictures.attention import attention_view
from nicehooks.ports.attention import fused_attention_as_steps
from nicehooks.servers.serving import serving
from nicehooks.values.regions import Heads, Rows
from nicehooks.values.trees import KEEP

HANDED_OUT = [
    ActiveRecord,
    ActiveTable,
    Autoencoder,
    Axis,
    Calls,
    Effect,
    Heads,
    Part,
    Parts,
    Probe,
    Rows,
    SiteRecord,
    SiteTable,
    StoredColumn,
    StoredRows,
]


def _is_handed_out(thing: object) -> bool:
    return any([thing is other for other in HANDED_OUT])


moved.belong_to(__name__, HANDED_OUT)
moved.belong_to(
    "nicehooks", [thing for name, thing in list(globals().items()) if name[0] != "_" and not _is_handed_out(thing)]
)
