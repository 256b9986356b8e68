"""The house holds: small rooms, arrows that point down, and names that are what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import spanguard

SOURCE = Path(spanguard.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

MAX_LINES, MAX_FUNCTION_LINES = 350, 40

# What users may name of MLflow and OpenTelemetry. All else is for `_mlflow` alone.
PUBLIC_MODULES = {
    "mlflow",
    "mlflow.entities",
    "mlflow.exceptions",
    "mlflow.tracking",
    "opentelemetry.sdk.trace",
    "opentelemetry.trace",
}

# Names and paths that users' code is written against.
PUBLIC_NAMES = {
    "spanguard": """
        BatchResult CustomTraceManager Delivery DuplicateTraceIdError EmptyTraceStackError
        InvalidParentError InvalidSpanArgumentError ItemOutcome Limits MAX_ATTRIBUTES
        MAX_MESSAGE_CHARS MAX_VALUE_CHARS OpenSpan OrphanedSpanError OrphanedSpanWarning
        SpanAlreadyEndedError SpanOrderError SpanguardError SpanguardWarning TraceContext
        TraceLostError TraceStateManager UnknownSpanError __version__ capture carry
        close_open_spans current_span deliver delivery flush guard install_signal_handlers limits
        open_spans strict
        trace_batch trace_id_for traced traced_span watch
    """,
    "spanguard.asgi": "TraceMiddleware",
    "spanguard.cli": "main",
    "spanguard.exceptions": """
        DuplicateTraceIdError DuplicateTraceIdWarning EmptyTraceStackError EmptyTraceStackWarning
        InvalidParentError InvalidParentWarning InvalidSpanArgumentError InvalidSpanArgumentWarning
        OrphanedSpanError OrphanedSpanWarning SpanAlreadyEndedError SpanAlreadyEndedWarning
        SpanOpenTooLongWarning SpanOrderError SpanOrderWarning SpanguardError SpanguardWarning
        TraceLostError TraceLostWarning UnknownSpanError UnknownSpanWarning
    """,
    "spanguard.render": "TraceTree",
    "spanguard.testing": """
        RecordedSpan RecordedSpans SpansLeftOpenError forget_warnings no_open_spans record_spans
    """,
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    parts = ("spanguard", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_no_file_is_long() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_function_is_long() -> None:
    """What is documented is not counted."""
    too_long = {}
    for path in FILES:
        for function in functions(tree_of(path)):
            assert function.end_lineno is not None
            body = function.body[ast.get_docstring(function) is not None :]
            length = function.end_lineno - body[0].lineno + 1 if body else 0
            if length > MAX_FUNCTION_LINES:
                too_long[f"{name_of(path)}.{function.name}"] = length
    assert too_long == {}


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_the_public_names_stay_where_they_are(module: str) -> None:
    assert set(importlib.import_module(module).__all__) >= set(PUBLIC_NAMES[module].split())


def test_only_one_package_imports_what_is_not_public_of_mlflow() -> None:
    found = set()
    for path in FILES:
        if name_of(path).startswith("spanguard._mlflow"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = {node.module}
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
            else:
                continue
            foreign = {name for name in named if name.split(".")[0] in ("mlflow", "opentelemetry")}
            found |= {(name_of(path), name) for name in foreign - PUBLIC_MODULES}
    assert found == set()


def test_all_is_true() -> None:
    """What other modules use of a module is in its `__all__`, and nothing else is."""
    modules = {name_of(path): tree_of(path) for path in FILES}
    used: dict[str, set[str]] = defaultdict(set)
    for tree in modules.values():
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in modules:
                        aliases[alias.asname or alias.name] = full
                    else:
                        used[node.module].add(alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = aliases.get(node.value.id)
                if module is not None and hasattr(importlib.import_module(module), node.attr):
                    used[module].add(node.attr)
    wrong = {}
    for name in modules:
        if name.endswith(("__main__", "pytest_plugin")):
            continue
        listed = set(getattr(importlib.import_module(name), "__all__", ()))
        public = set(PUBLIC_NAMES.get(name, "").split())
        missing = used[name] - listed - {"__version__"}
        unused = listed - used[name] - public
        if missing or (unused and not public):
            wrong[name] = (sorted(missing), sorted(unused))
    assert wrong == {}


def callables_of(module: str, name: str) -> Iterator[tuple[str, object]]:
    """Name a public function, or a class and each of its public methods."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isroutine(value) or inspect.isclass(value):
        yield name, value
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        member = getattr(member, "fget", getattr(member, "__func__", member))
        if inspect.isfunction(member) and not attribute.startswith("_"):
            yield f"{name}.{attribute}", member


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_annotations_can_be_read_at_run_time(module: str) -> None:
    """What injects arguments or draws up documentation asks for them."""
    for name in PUBLIC_NAMES[module].split():
        for _, value in callables_of(module, name):
            get_type_hints(value)
