"""What a model will need on a machine that may not be here, as that machine's compiler says."""

from lsjax.plan.compiled import Needs, compile_for
from lsjax.plan.targets import Target, find_target, target_mesh

__all__ = ["Needs", "Target", "compile_for", "find_target", "target_mesh"]
