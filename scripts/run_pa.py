"""Answers prompts: texts, files of any length, token ids or chats.

See lsjax/cli/run_pa.py.
"""

from lsjax.cli.run_pa import program

if __name__ == "__main__":
    program()
