"""The code that goes into a patched checkpoint: our own source files, joined to one module.

transformers copies a checkpoint's Python files one by one into a cache and imports them from
there, so packages can't travel; one file can. It is fixed text: nothing of a model enters it.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from mra_cli import __version__

SOURCES = (
    "mra_cli.errors",
    "mra_kernels.config",
    "mra_kernels.pyramid",
    "mra_kernels.masks",
    "mra_kernels.scores",
    "mra_kernels.exact",
    "mra_kernels.layout",
    "mra_kernels.selection",
    "mra_kernels.reference",
    "mra_kernels.features",
    "mra_kernels.keys",
    "mra_cli.data.native",
    "mra_kernels.decode",
    "mra_kernels.api",
    "mra_cli.host",
    "mra_cli.caches",
    "mra_cli.calls",
    "mra_cli.methods.rows",
    "mra_cli.methods.base",
    "mra_cli.methods.mra",
    "mra_cli.methods.mra_keys",
    "mra_cli.methods.bands",
    "mra_cli.methods.features",
    "mra_cli.methods.bigbird",
    "mra_cli.methods.cluster_kv",
    "mra_cli.methods.combiner",
    "mra_cli.methods.h1d",
    "mra_cli.methods.longformer",
    "mra_cli.methods.nystrom",
    "mra_cli.methods.performer",
    "mra_cli.methods.probsparse",
    "mra_cli.methods.scatterbrain",
    "mra_cli.methods.skein",
    "mra_cli.methods.smyrf",
    "mra_cli.methods.topk",
    "mra_cli.methods.vmean",
    "mra_cli.methods.window",
    "mra_cli.methods.calibration",
    "mra_cli.methods.linformer",
    "mra_cli.methods.sparsefinder",
    "mra_cli.methods.sbm",
    "mra_cli.methods.tff",
    "mra_cli.methods",
    "mra_cli.plan",
    "mra_cli.patching",
    "mra_cli.remote",
)
"""Modules of the runtime, each after those it imports. `mra_kernels.native` has a stand-in."""

_OURS = ("mra_cli", "mra_kernels")
_JOINED = (*SOURCES, "mra_kernels")

_HEAD = f'''"""Multi-resolution attention in plain torch, and its wiring into transformers.

The source files of mra-cli {__version__} that this needs, joined by `mra-cli patch`; Apache-2.0.
"""

from __future__ import annotations
'''


@cache
def code_files() -> dict[str, str]:
    """Name and text of the Python files of a patched checkpoint."""
    modeling = files("mra_cli").joinpath("data/modeling_mra.py").read_text(encoding="utf-8")
    return {"modeling_mra.py": modeling, "mra_runtime.py": _joined()}


@cache
def implementation_name() -> str:
    """What patched attention is called in transformers' registry.

    Registrations are global to a process: runtimes of different text get different names.
    """
    digest = hashlib.sha256("".join(code_files().values()).encode()).hexdigest()
    return f"mra_{digest[:8]}"


def _joined() -> str:
    sections = [_HEAD]
    defined: dict[str, str] = {}
    for module in SOURCES:
        path = module.split(".")
        source = files(path[0]).joinpath(*path[1:])
        file = source.joinpath("__init__.py") if source.is_dir() else source.with_suffix(".py")  # type: ignore[attr-defined]
        text = file.read_text(encoding="utf-8")
        for node in _imports(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module in _JOINED:
                missing = {a.name for a in node.names if a.asname or a.name not in defined}
                if missing:
                    raise RuntimeError(f"{module} imports {missing}, which must come before it")
        for name, origin in _top_level_names(text, module):
            if defined.setdefault(name, origin) != origin:
                raise RuntimeError(f"{name} is of {defined[name]} and of {origin}: rename one")
        sections.append(f"\n\n# {'-' * 20} {module}\n\n{_alone(text, module)}")
    return "".join(sections)


def _alone(text: str, module: str) -> str:
    """The text of a module without the imports that joining makes needless.

    Imports from modules that are not joined (optional parts, imported where they are used) fail
    as if the part were not installed.
    """
    lines = text.splitlines()
    for node in _imports(ast.parse(text)):
        replacement = ""
        if isinstance(node, ast.ImportFrom) and node.module not in (*_JOINED, "__future__"):
            if not node.col_offset:
                raise RuntimeError(f"{module} imports {node.module}: add that to SOURCES")
            replacement = f'raise ImportError("{node.module} is not part of this runtime")'
        elif node.col_offset and not isinstance(node, ast.If):
            replacement = "pass"
        assert node.end_lineno is not None
        first, *others = range(node.lineno - 1, node.end_lineno)
        lines[first] = " " * node.col_offset + replacement if replacement else "\0"
        for number in others:
            lines[number] = "\0"
    return "\n".join(line for line in lines if line != "\0").strip() + "\n"


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that import from our modules or the future, and blocks for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield child
        elif isinstance(child, ast.ImportFrom) and child.module is not None:
            if child.module.split(".")[0] in (*_OURS, "__future__"):
                yield child
        elif isinstance(child, ast.Import):
            if {alias.name.split(".")[0] for alias in child.names} & set(_OURS):
                raise RuntimeError("modules of the runtime must import ours by 'from ... import'")
        else:
            yield from _imports(child)


def _top_level_names(text: str, module: str) -> Iterator[tuple[str, str]]:
    """Names a module binds, and where each is from."""
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, module
        elif isinstance(node, ast.Assign):
            yield from ((t.id, module) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, module
        elif isinstance(node, ast.Import):
            yield from ((a.asname or a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module not in _JOINED:
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
