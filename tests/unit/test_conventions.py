"""What every part of the project keeps to, checked by machine: errors, exports, docstrings, imports, documents."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests import reference
from tests.metrics_page import METRICS_PAGE, metrics_page
from trilith import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"client/trilith": "trilith", "services/trilith_services": "trilith_services"}
HEAVY = ["kazoo", "numba", "pyarrow", "torch", "trilith_services"]
KERNEL_IMPORTS = {
    "numpy",
    "numba",
    *(f"trilith.ops.{name}" for name in ("hashing", "jit", "memory", "slots", "vectors")),
}


def sources() -> list[Path]:
    """Every hand-written module of the client and the services."""
    return sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


def kernel_modules() -> list[Path]:
    return sorted((ROOT / "services/trilith_services/ps/engine/kernels").glob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    root = ROOT / ("client" if path.is_relative_to(ROOT / "client") else "services")
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def assigned_all(module: ast.Module) -> list[str] | None:
    """The value of `__all__`, or None if the module has none."""
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


def decorator_names(function: ast.FunctionDef) -> set[str]:
    calls = (decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in function.decorator_list)
    return {ast.unparse(call).split(".")[-1] for call in calls}


# ---- errors --------------------------------------------------------------------------------------------------------


def subclasses(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from subclasses(child)


def test_every_error_is_found_by_name():
    ours = {cls for cls in subclasses(errors.TrilithError) if cls.__module__ == "trilith.errors"}
    assert {cls.__name__: cls for cls in ours} == errors.BY_NAME


@pytest.mark.parametrize("cls", errors.BY_NAME.values(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_real_grpc_status(cls):
    assert cls.status in grpc.StatusCode.__members__
    assert cls.status != "OK"


@pytest.mark.parametrize("cls", errors.BY_NAME.values(), ids=lambda cls: cls.__name__)
def test_every_error_is_exported_drawn_in_the_tree_and_says_what_it_was_told(cls):
    assert cls.__name__ in errors.__all__
    assert re.search(rf"\b{cls.__name__}\b", errors.__doc__)
    assert str(cls("no table 'x'")) == "no table 'x'"


def test_errors_that_may_cross_the_wire_are_defined_nowhere_else():
    # What goes wrong with data goes wrong in the reader's own process.
    local = [ROOT / "client/trilith/data", ROOT / "services/trilith_services/demo"]
    elsewhere = [
        f"{label(path)}: {node.name}"
        for path in sources()
        if path.name != "errors.py" and not any(path.is_relative_to(folder) for folder in local)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in errors.BY_NAME for base in node.bases)
    ]
    assert elsewhere == []


# ---- exports and docstrings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(), ids=label)
def test_a_module_opens_with_a_docstring(path):
    assert ast.get_docstring(tree(path)), "say in one sentence what the module owns"


@pytest.mark.parametrize("path", [path for path in sources() if assigned_all(tree(path)) is not None], ids=label)
def test_a_modules_exports_are_complete(path):
    if path.parent.name == "commands":
        return  # a command is public on the command line; of its module, `register` is all
    module = tree(path)
    exported = assigned_all(module)
    assert len(set(exported)) == len(exported)
    public = {
        node.name
        for node in module.body
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, ast.FunctionDef) and not decorator_names(node) & {"kernel", "inlined", "part"})
    }
    hidden = {name for name in public if not name.startswith("_")} - set(exported)
    assert not hidden, "export it, or begin its name with an underscore"


@pytest.mark.parametrize("name", ["trilith", "trilith.errors", "trilith.tables"])
def test_every_export_is_there(name):
    module = importlib.import_module(name)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_module_of_the_client_says_what_it_exports():
    silent = [
        label(path)
        for path in sources()
        if path.is_relative_to(ROOT / "client") and path.name != "__init__.py" and assigned_all(tree(path)) is None
    ]
    assert silent == []


# ---- imports -------------------------------------------------------------------------------------------------------


def test_importing_the_client_stays_light():
    program = f"import sys, trilith, trilith.tables; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == []


def test_outside_the_repo_the_source_roots_cannot_be_imported(tmp_path):
    program = """
import importlib.util
print(*[name for name in ("services", "client", "protos") if importlib.util.find_spec(name)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == []


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            # `from package import module` and `from module import name` look alike: judge both readings.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", kernel_modules(), ids=label)
def test_kernels_import_arrays_compiler_and_each_other_only(path):
    allowed = KERNEL_IMPORTS | {"trilith_services.ps.engine.kernels"}
    for name in imported(tree(path)):
        standard = name.split(".")[0] in sys.stdlib_module_names
        assert standard or any(name == part or name.startswith(f"{part}.") for part in allowed), name


# ---- kernels -------------------------------------------------------------------------------------------------------


def kernels() -> list[tuple[str, ast.FunctionDef]]:
    """Every function under `@kernel(...)`, also those that a factory makes."""
    return [
        (f"{label(path)}:{node.name}", node)
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and "kernel" in decorator_names(node)
    ]


@pytest.mark.parametrize("function", [pytest.param(node, id=name) for name, node in kernels()])
def test_a_kernel_has_a_docstring(function):
    assert ast.get_docstring(function)


def test_kernels_are_compiled_through_the_one_decorator():
    direct = [
        label(path)
        for path in sources()
        if path.name != "jit.py"
        and re.search(r"^\s*@(numba\.)?(n?jit|vectorize|guvectorize)\b", path.read_text(), re.M)
    ]
    assert direct == []


# ---- documents -----------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    return [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def programs(document: Path) -> list[str]:
    """A document's python blocks in order; one below `<!-- not run: why -->` is left out."""
    text = document.read_text()
    blocks = re.finditer(r"(?P<skip><!-- not run:[^\n]*-->\n+)?^```python\n(?P<code>.*?)^```$", text, re.M | re.S)
    return [block["code"] for block in blocks if not block["skip"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            document, marks=[pytest.mark.jobs] if document.parent.name == "recipes" else [], id=label(document)
        )
        for document in documents()
        if programs(document)
    ],
)
def test_the_python_of_a_document_runs(document, tmp_path):
    program = "\n".join(programs(document))
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}  # as a reader's
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{program}\n{done.stderr}"


@pytest.mark.parametrize("document", documents(), ids=label)
def test_what_a_document_links_to_and_names_is_there(document):
    text = document.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)  # in code f[i](x) is a call
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert [link for link in links if link and not (document.parent / link).exists()] == []
    named = set(re.findall(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|proto|md|png|yml|env|cfg))`", text))
    roots = [ROOT / name for name in ("client", "deploy", "docs", "protos", "services", "tests")]
    paths = [f"{path}/" for path in [*ROOT.glob("*"), *(path for root in roots for path in [root, *root.rglob("*")])]]
    assert sorted(name for name in named if not any(path.endswith(f"/{name.rstrip('/')}/") for path in paths)) == []


def test_the_page_of_flags_and_environment_variables_is_fresh():
    assert reference.undescribed() == [], "describe it in tests/reference.py"
    assert reference.PAGE.read_text() == reference.page(), "stale: run make docs"


def test_the_page_of_metrics_is_fresh():
    assert METRICS_PAGE.read_text() == metrics_page(), "stale: run make docs"


# ---- packaging -----------------------------------------------------------------------------------------------------


def test_every_dependency_is_locked_to_a_plain_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(requirement for extra in project["optional-dependencies"].values() for requirement in extra),
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line)] == []
    assert names <= {line.split("==")[0] for line in lines}
