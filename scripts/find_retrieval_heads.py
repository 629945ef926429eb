"""Finds a model's retrieval heads for --kv_compression=razor; needed once per model.

See lsjax/cli/find_retrieval_heads.py.
"""

from lsjax.cli.find_retrieval_heads import program

if __name__ == "__main__":
    program()
