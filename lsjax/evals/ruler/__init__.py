"""The kinds of task of RULER (arXiv 2404.06654), in small: needles, chains of variables, words.

`tasks` makes texts and questions, and `measure` asks a model.
"""

from lsjax.evals.ruler.measure import Table, measure
from lsjax.evals.ruler.tasks import TASKS, Case, Question

__all__ = ["TASKS", "Case", "Question", "Table", "measure"]
