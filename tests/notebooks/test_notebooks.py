"""The notebooks run from the first cell to the last, and hold the outputs of such a run.

`HACKLE_UPDATE_GOLDEN=1` trains as much as they say, and keeps the outputs.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from hackle.layers import in_place
from tests.house.tree import ROOT

# What a test runs behind the cell tagged "parameters".
SMALL = {
    "recurrence": "STEPS, LENGTHS = 400, (64, 128)",
    "streams": "STEPS, COSTS = 4, dict(width=32, mlp_width=64, depth=2)",
    "branches": "STEPS, PROBLEMS = 4, 3",
}
# What of the suite's environment a reader has not.
OF_TESTS = ("MPLBACKEND", "XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION")
every_notebook = pytest.mark.parametrize("name", SMALL)


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(path_of(name), as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def written(notebook: nbformat.NotebookNode) -> str:
    """All text that its cells wrote."""
    found = [out for cell in code_cells(notebook) for out in cell.outputs]
    return "\n".join(out.text for out in found if out.output_type == "stream")


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == SMALL.keys()


def test_all_begin_alike():
    """With one cell that installs, and the flag that the library asks for."""
    (first,) = {code_cells(read(name))[0].source for name in SMALL}
    flag, value = in_place.FLAG.split("=")
    assert f'FLAG = "{flag}"' in first and f"{{FLAG}}={value}" in first


@every_notebook
def test_what_is_stored(name):
    """Outputs of one run from top to bottom; no error, and no place of one machine."""
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert not re.search("Traceback|Warning|/home/|/tmp/|/root/", written(notebook))
    assert notebook.metadata.language_info == {"name": "python"}  # of any version


@pytest.mark.slow
@every_notebook
def test_it_runs(name, tmp_path):
    notebook = read(name)
    update = os.environ.get("HACKLE_UPDATE_GOLDEN")
    if not update:
        (at,) = (i for i, cell in enumerate(notebook.cells) if "tags" in cell.metadata)
        assert notebook.cells[at].metadata.tags == ["parameters"]
        notebook.cells.insert(at + 1, new_code_cell(SMALL[name]))
    folder = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=900, record_timing=False, resources=folder)
    client.execute(env={k: v for k, v in os.environ.items() if k not in OF_TESTS})
    text = written(notebook)
    if name == "recurrence":
        assert text.count("100.00 % right") == 4
    if name == "branches":
        same, chosen = re.search(r"(\d+) of (\d+) choices are the same", text).groups()
        assert same == chosen
    if update:
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path_of(name))
