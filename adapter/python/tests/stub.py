"""Copies the docstrings of the built module into its stub, `kvring/_native.pyi`. Where the package is installed, run

    python adapter/python/tests/stub.py
    ruff check --fix adapter/python/kvring/_native.pyi && ruff format adapter/python/kvring/_native.pyi

A test says when that is due.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

from kvring import _native

STUB = Path(__file__).resolve().parent.parent / "kvring" / "_native.pyi"


def document(node: ast.ClassDef | ast.FunctionDef, found: object, indent: str) -> None:
    """Gives a class or a function the docstring of what the module has under its name; to a class's members as well."""
    body = [item for item in node.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
    doc = inspect.getdoc(found) if node.name != "__init__" else None
    text = textwrap.indent(doc or "", indent).strip()
    node.body = [ast.Expr(ast.Constant(text if doc else ...)), *body] if doc or not body else body
    for item in body:
        if isinstance(item, ast.FunctionDef):
            document(item, getattr(found, item.name), indent + "    ")


def main() -> None:
    """Writes the stub."""
    stub = ast.parse(STUB.read_text())
    for node in stub.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            document(node, getattr(_native, node.name), "    ")
    STUB.write_text(ast.unparse(stub) + "\n")


if __name__ == "__main__":
    main()
