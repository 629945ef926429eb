"""Lists every name of the library, its programs and its tests, a line each.

python tests/list_names.py                  module, class, function, parameter, attribute, flag
python tests/list_names.py | grep -w keep   where a name stands
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("lsjax", "scripts", "checkpoints_convert", "tests")


def main() -> None:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT)
            print(f"module    {path.stem:32} {where}")
            for kind, name, line in sorted(names_in(path), key=lambda found: found[2]):
                print(f"{kind:9} {name:32} {where}:{line}")


def names_in(path: pathlib.Path):
    """Yields kind, name and line of everything that a file names for others to read."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield "class", node.name, node.lineno
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield "attribute", field.target.id, field.lineno
        elif isinstance(node, ast.FunctionDef):
            yield "function", node.name, node.lineno
            a = node.args
            for argument in filter(
                None, (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
            ):
                yield "parameter", argument.arg, argument.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            yield "flag", ast.literal_eval(node.args[0]), node.lineno


if __name__ == "__main__":
    main()
