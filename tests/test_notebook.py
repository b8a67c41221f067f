"""The Colab notebook runs from top to bottom, on a small setting."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "colab" / "quickstart.ipynb"


@pytest.mark.long
def test_the_notebook_runs_and_shows_its_pictures(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JAXCOST_SMALL", "1")
    monkeypatch.setenv("JAXCOST_WORKDIR", str(tmp_path / "study"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}})
    client.execute()
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    assert (tmp_path / "study" / "report.html").is_file()
