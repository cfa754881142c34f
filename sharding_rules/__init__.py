"""Which dimension of which array goes on which mesh axis. No cost, no device."""

from sharding_rules.errors import PlanError
from sharding_rules.explain import format_bytes
from sharding_rules.frozen import Frozen, NotTrained, is_frozen, split_frozen, trainable
from sharding_rules.kernels import AttentionCall, Kernels, attention
from sharding_rules.layout import Layout, make_layout
from sharding_rules.mesh import AXES, BATCH_AXES, CONTEXT, DATA, EXPERT, FSDP, STAGE, TENSOR, MeshShape, make_mesh
from sharding_rules.mixture import ExpertsCall, experts
from sharding_rules.trace import TracedFunction, abstract, path_str, trace, tree_paths

__all__ = [
    "AXES",
    "BATCH_AXES",
    "CONTEXT",
    "DATA",
    "EXPERT",
    "FSDP",
    "STAGE",
    "TENSOR",
    "AttentionCall",
    "ExpertsCall",
    "Frozen",
    "Kernels",
    "Layout",
    "MeshShape",
    "NotTrained",
    "PlanError",
    "TracedFunction",
    "abstract",
    "attention",
    "experts",
    "format_bytes",
    "is_frozen",
    "make_layout",
    "make_mesh",
    "path_str",
    "split_frozen",
    "trace",
    "trainable",
    "tree_paths",
]
