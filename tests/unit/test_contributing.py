"""CONTRIBUTING.md's recipes, taken step by step on a copy of the tree: a page that is wrong fails."""

from __future__ import annotations

import os
import re
import shlex
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
    recipe.partition("\n")[0]: re.findall(r"^```(diff|sh)\n(.*?)^```$", recipe, re.M | re.S)
    for recipe in PAGE.read_text().split("\n### ")[1:]
}
"""By heading: what becomes of each file, and what is run then."""


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


def run(command: str, root: Path) -> None:
    """Do in the copy what the page tells to run."""
    match shlex.split(command):
        case ["make", "proto"]:
            if not PROTOC.exists():
                absent("no .venv-proto: make proto-check makes it")
            (root / ".venv-proto").symlink_to(PROTOC)
            argv = ["make", "--old-file", ".venv-proto/.stamp", "proto"]
        case ["make", "docs"]:
            argv = [sys.executable, "-m", "tests.reference"]
        case [".venv/bin/python", *arguments]:
            argv = [sys.executable, *arguments]
        case _:
            pytest.fail(f"nothing here knows how to run {command}")
    sources = os.pathsep.join(str(root / name) for name in ("protos", "client", "services", "."))
    done = subprocess.run(
        argv,
        cwd=root,
        env=os.environ | {"PYTHONPATH": sources},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_who_follows_a_recipe_arrives(recipe, tmp_path):
    for name in ("protos", "client", "services", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "docker-compose.yml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    written = [apply(text, tmp_path) for language, text in RECIPES[recipe] if language == "diff"]
    commands = "".join(text for language, text in RECIPES[recipe] if language == "sh").splitlines()
    assert any("pytest" in command for command in commands), "a recipe ends with a test"
    for command in commands:
        run(command, tmp_path)
    sources = " ".join(str(path) for path in written if path.suffix == ".py")
    run(f".venv/bin/python -m ruff check -q {sources}", tmp_path)
    run(f".venv/bin/python -m ruff format --check {sources}", tmp_path)
