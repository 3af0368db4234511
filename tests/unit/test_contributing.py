"""CONTRIBUTING.md's recipes, taken step by step on a copy of the tree: a page that is wrong fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.absent import absent

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
PROTOC = ROOT / ".venv-proto"
RECIPES = {
    recipe.partition("\n")[0]: re.findall(r"^```diff\n(.*?)^```$", recipe, re.M | re.S)
    for recipe in PAGE.read_text().split("\n### ")[1:]
}
"""By heading: what becomes of each file, as the block says it."""


def apply(block: str, root: Path) -> Path:
    """Do to a copy what a block shows: put lines that begin with + between the others, which must stand there once."""
    name, *lines = block.splitlines()
    assert all(line[:1] in ("", " ", "+") for line in lines), name
    path = root / name
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines)
    if old:
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has this {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new))
    else:
        assert not path.exists(), f"{name} is there already"
        path.write_text(new)
    return path


def run(root: Path, *argv: str) -> None:
    """Run a Python program in the copy, whose sources it imports."""
    roots = os.pathsep.join(str(root / each) for each in ("protos", "client", "services", "."))
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=root, env=os.environ | {"PYTHONPATH": roots}, check=False, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_who_follows_a_recipe_arrives(recipe, tmp_path):
    for name in ("protos", "client", "services", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "docker-compose.yml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()

    written = [apply(block, tmp_path) for block in RECIPES[recipe]]
    if any(path.suffix == ".proto" for path in written):
        if not PROTOC.exists():
            absent("no .venv-proto: make proto-check makes it")
        (tmp_path / ".venv-proto").symlink_to(PROTOC)
        subprocess.run(["make", "--old-file", ".venv-proto/.stamp", "proto"], cwd=tmp_path, check=True)
    sources = [str(path) for path in written if path.suffix == ".py"]
    run(tmp_path, "-m", "ruff", "check", "-q", *sources)
    run(tmp_path, "-m", "ruff", "format", "--check", *sources)
    run(tmp_path, "-m", "tests.reference")  # as `make docs`
    tests = [path for path in sources if Path(path).name.startswith("test_")]
    assert tests, "a recipe ends with a test"
    run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
