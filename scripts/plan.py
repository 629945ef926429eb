"""Plans how long a text fits on given devices, before any weights are loaded.

See lsjax/cli/plan.py.
"""

from lsjax.cli.plan import program

if __name__ == "__main__":
    program()
