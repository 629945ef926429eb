"""Measures a model on RULER's kinds of task: needles, chains of variables, frequent words.

See lsjax/cli/eval_ruler.py.
"""

from lsjax.cli.eval_ruler import program

if __name__ == "__main__":
    program()
