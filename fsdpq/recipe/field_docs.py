"""The documentation of a recipe's fields: the docstring below each field of an options class.

pydantic can read these itself (``use_attribute_docstrings``), but it does so for every class
whenever the module is imported, which was a fifth of the time of ``fsdpq validate``. Here a module
is parsed once, and only when somebody asks.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel


@cache
def field_docs(options: type[BaseModel]) -> Mapping[str, str]:
    """Returns the docstring of every field of ``options``, inherited ones too, by field name."""
    found: dict[str, str] = {}
    for owner in reversed(options.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            found |= _docs_in_module(owner.__module__).get(owner.__name__, {})
    return {name: found[name] for name in options.model_fields if name in found}


def field_doc(options: type[BaseModel], name: str) -> str:
    """Returns the docstring of one field on one line, in Markdown; empty where it has none."""
    return " ".join(field_docs(options).get(name, "").replace("``", "`").split())


@cache
def _docs_in_module(name: str) -> dict[str, dict[str, str]]:
    """Returns class name -> field -> docstring of the module ``name``."""
    path = Path(sys.modules[name].__file__ or "")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: _docs_in_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_in_class(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(below.value.value))
    return docs
