"""What a model will need on a machine that may not be here."""

from lsjax.planning.layout import Layout
from lsjax.planning.needs import Needs
from lsjax.planning.planner import Plan, plan
from lsjax.planning.targets import Target, find_target, target_mesh

__all__ = ["Layout", "Needs", "Plan", "Target", "find_target", "plan", "target_mesh"]
