"""Every notebook runs from top to bottom in a fresh kernel of this very Python, says no warning, and ends in a picture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|mnt|var|private|Users)/|\b[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS


# The first two with every run of the tests; the others take a minute, and use what these use and the benches.
@pytest.mark.parametrize(
    "path",
    [path if path.stem[0] in "12" else pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_executes(path, tmp_path, monkeypatch):
    use_empty_home(tmp_path / "home", monkeypatch)
    use_this_python(tmp_path / "jupyter", monkeypatch)
    notebook = nbformat.read(path, as_version=4)
    working_directory = tmp_path / "work"
    working_directory.mkdir()
    resources = {"metadata": {"path": str(working_directory)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=120, resources=resources)
    client.execute()  # raises CellExecutionError at the first failing cell
    require_clean_outputs(notebook)
    assert not list(working_directory.iterdir())


@each_notebook
def test_stored_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    assert not any("execution" in cell.metadata for cell in cells), "holds timestamps"
    require_clean_outputs(notebook)


@each_notebook
def test_names_no_absolute_path(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for text in (cell.source, *map(text_of, cell.get("outputs", ()))):
            assert not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize("text", ["/root/x", "in '/home/me/x.py'", "(/tmp/a)", "C:\\Users\\me"])
def test_absolute_paths_are_found(text):
    assert ABSOLUTE_PATH.search(text)


def use_this_python(folder, monkeypatch):
    """The kernel "python3" is the Python that runs the tests: JUPYTER_PATH is searched before what a user installed."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


def use_empty_home(home, monkeypatch):
    """No start-up file or style sheet of a user's reaches the kernel, and nothing is written outside of the test's folder."""
    home.mkdir()
    jupyter = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    for name in ("HOME", "USERPROFILE", "IPYTHONDIR", "MPLCONFIGDIR", *jupyter):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # ipykernel sets the one that stores pictures
    # matplotlib's first import lists the fonts, and says so on stderr where that takes long.
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], env=os.environ, capture_output=True, check=True)


def require_clean_outputs(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    for output in outputs:
        assert output.output_type != "error", output.evalue
        assert output.get("name") != "stderr", output.text
        assert "Warning" not in text_of(output), text_of(output)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """All that an output says, pictures left out: base64 holds slashes."""
    data = {key: value for key, value in output.get("data", {}).items() if not key.startswith("image/")}
    return "\n".join([output.get("text", ""), *map(str, data.values()), *output.get("traceback", ())])
