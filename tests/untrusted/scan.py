"""Ways in which Python code would execute what is in a file, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
"""They read objects by calling what the file names."""

BUILT_IN = {"eval", "exec", "compile", "__import__"}
FUNCTIONS = {
    "yaml": {
        *("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"),
        *("Loader", "UnsafeLoader", "FullLoader", "CLoader", "CFullLoader", "CUnsafeLoader"),
    },
    "pandas": {"read_pickle"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "os": {"system", "popen"},
}
"""By module; loaders of yaml are classes."""

SAFE_VALUES = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True, "shell": False}
"""Of parameters, wherever they are given: nothing but these."""


def findings(source: str) -> list[str]:
    """``line: rule`` for each place in ``source`` that could execute what it reads."""
    return [f"{line}: {rule}" for node in ast.walk(ast.parse(source)) for line, rule in _of(node)]


def _of(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] in MODULES:
                yield node.lineno, "pickle"
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module.split(".")[0] in MODULES:
            yield node.lineno, "pickle"
        for alias in node.names:
            if alias.name in FUNCTIONS.get(module, ()):
                yield node.lineno, f"{module}.{alias.name}"
    elif isinstance(node, ast.Attribute):
        if (owner := _name(node.value)) in FUNCTIONS and node.attr in FUNCTIONS[owner]:
            yield node.lineno, f"{owner}.{node.attr}"
    elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "trust-remote-code"):
        yield node.lineno, "trust_remote_code"
    elif isinstance(node, ast.Call):
        yield from ((node.lineno, rule) for rule in _of_call(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    for name in SAFE_VALUES.keys() & given.keys():
        value = given[name]
        if not (isinstance(value, ast.Constant) and value.value is SAFE_VALUES[name]):
            yield name
    if isinstance(call.func, ast.Attribute):
        is_load = _name(call.func.value) == "torch" and call.func.attr == "load"
        if is_load and "weights_only" not in given:
            yield "weights_only"
    elif _name(call.func) in BUILT_IN:
        yield _name(call.func)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
