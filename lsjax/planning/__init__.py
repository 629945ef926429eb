"""Planning: what a model needs on devices that need not be present."""

from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.planner import plan
from lsjax.planning.result import Plan
from lsjax.planning.targets import Target, find_target, target_mesh

__all__ = ["Deployment", "MemoryUsage", "Plan", "Target", "find_target", "plan", "target_mesh"]
