"""Measures a model on RULER's kinds of task: needles, chains of variables, frequent words.

See lsjax/cli/evals/ruler.py.
"""

from lsjax.cli.evals.ruler import program

if __name__ == "__main__":
    program()
