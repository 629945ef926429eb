"""Lists saved documents, and deletes them.

See lsjax/cli/documents.py.
"""

from lsjax.cli.documents import program

if __name__ == "__main__":
    program()
