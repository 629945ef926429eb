"""What every text of the library keeps to, as far as a machine can tell."""

import ast
import io
import tokenize

import pytest
from helpers.programs import ROOT

FILES = sorted(
    path
    for folder in ("lsjax", "scripts", "checkpoints_convert", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def texts(path):
    """Docstrings, comments and the help of flags, with their lines."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""
        elif isinstance(node, ast.Call) and "DEFINE_" in ast.dump(node.func):
            for value in (*node.args, *(keyword.value for keyword in node.keywords)):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.lineno, value.value
    previous = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != previous + 1:  # a comment's first line
                yield token.start[0], token.string.lstrip("# ")
            previous = token.start[0]


@pytest.mark.parametrize("folder", ["lsjax", "scripts", "checkpoints_convert", "tests"])
def test_no_text_begins_with_what_it_is_about(folder):
    inside = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    assert inside
    assert not [
        f"{path}:{line}: {text[:60]}"
        for path in inside
        for line, text in texts(path)
        if text.startswith("Of ")
    ]
