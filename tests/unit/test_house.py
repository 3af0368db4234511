"""How the house is built: no circles of files, folders to look over, and one way down from a call to its kernel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["trilith", "trilith_services", "trilith_proto"]
MOST_FILES = 20
MOST_FILES_ON_THE_WAY = 10


# ---- circles -------------------------------------------------------------------------------------------------------


def test_no_files_import_each_other_in_a_circle():
    # Imports in functions and those for the type checker count: both are in the way of whoever reads.
    found = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: found.find_modules_directly_imported_by(module) for module in found.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])), pytrace=False)


# ---- folders and modules -------------------------------------------------------------------------------------------


def by_hand(root: Path) -> Iterator[Path]:
    """Every module that is written, not generated."""
    return (path for path in sorted(root.rglob("*.py")) if "_pb2" not in path.name)


MODULES = [path for root in ("client", "services", "protos", "tests") for path in by_hand(ROOT / root)]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=label)
def test_a_folder_of_more_than_twenty_files_says_why(folder):
    files = [path for path in by_hand(folder) if path.parent == folder and path.name != "__init__.py"]
    if len(files) > MOST_FILES:
        assert re.search(r"^Flat: .", docstring(folder / "__init__.py"), re.M), (
            f"{len(files)} files: make rooms, or say why there are none in a line that begins 'Flat: ' in __init__.py"
        )


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_module_opens_with_one_sentence(path):
    opening = docstring(path).split("\n\n")[0]
    assert opening.endswith("."), "say in one sentence what it owns"
    assert not re.search(r"[.!?]\s+[A-Z]", opening), "what follows the first sentence is a paragraph of its own"


# ---- the way down --------------------------------------------------------------------------------------------------

WAYS = '''
import sys
import threading

import numpy as np

from tests.congruence.clusters import LocalCluster
from trilith.tables import Adagrad

LAST = {"lookup_rows", "apply_rows"}  # kernels
ways = []
watching = False


def watch(frame, event, argument):
    """Note the way to each kernel, and to each call of the file that sends requests."""
    if event != "call" or not watching:
        return
    file = frame.f_code.co_filename
    if frame.f_code.co_name not in LAST and not file.endswith("trilith/rpc/streams.py"):
        return
    way = [(file, frame.f_code.co_name)]
    below = sys._getframe(1)  # a compiled kernel's own frame knows nobody below it
    while below is not None:
        way.append((below.f_code.co_filename, below.f_code.co_qualname))
        below = below.f_back
    ways.append([f"{file}:{name}" for file, name in reversed(way) if "/trilith" in file])


threading.setprofile(watch)
sys.setprofile(watch)
ids = np.arange(100, dtype=np.uint64)
with LocalCluster(sys.argv[1]) as cluster, cluster.connect() as client:
    table = client.table("user", dim=4, optimizer=Adagrad())

    def work(ids):
        if sys.argv[2] == "lookup":
            table.lookup(ids)
        else:
            table.apply_gradients(ids, np.ones((ids.size, 4), np.float32))

    work(ids)
    work(ids)
    watching = True
    work(ids)
    watching = False
for way in ways:
    print(*way)
'''


def documented_way() -> list[str]:
    """The files that README's "Reading the code" lists, in order."""
    text = (ROOT / "README.md").read_text()
    listed = text.partition("## Reading the code")[2].partition("\n## ")[0].partition("\n1. ")[2].partition("\n\n")[0]
    return re.findall(r"`([\w/]+\.py)`", listed)


@pytest.fixture(scope="module")
def ways():
    """By shape of cluster and verb: the ways from the call down, each a list of (file, function)."""
    found = {}
    for shape in ("embedded", "1-ps"):
        for verb in ("lookup", "step"):
            done = subprocess.run(
                [sys.executable, "-c", WAYS, shape, verb],
                cwd=ROOT, check=False, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            lines = [line.split() for line in done.stdout.splitlines() if line]
            found[shape, verb] = [[tuple(step.removeprefix(f"{ROOT}/").split(":")) for step in line] for line in lines]
    return found


@pytest.mark.parametrize("verb", ["lookup", "step"])
@pytest.mark.parametrize("shape", ["embedded", "1-ps"])
def test_a_call_goes_down_through_few_files_in_the_order_of_the_readme(ways, shape, verb):
    order = documented_way()
    found = ways[shape, verb]
    kernel = "kernels/read.py" if verb == "lookup" else "kernels/apply.py"
    assert any(way[-1][0].endswith(kernel) for way in found)
    assert shape == "embedded" or any(way[0][0].endswith("trilith/rows.py") for way in found)
    for way in found:
        passed: list[str] = []
        last = ""
        for file, function in way:
            if file not in passed:
                passed.append(file)
            elif file != last:  # only what a file has handed down is called from below, and belongs to it
                assert "<locals>" in function, f"{last} calls {function} of {file}"
            last = file
        assert passed == [file for file in order if file in passed], "README tells another order"
        assert len(passed) <= MOST_FILES_ON_THE_WAY, passed
