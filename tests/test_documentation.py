"""What README, docs/ and examples/ say runs, and their links lead somewhere."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks_of(page):
    """The Python blocks of a page, each after as many empty lines as make line numbers right."""
    text = page.read_text()
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in _BLOCK.finditer(text)]


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name) for p in PAGES if _BLOCK.search(p.read_text())]
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom, in one namespace and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIAGCONV_CACHE_DIR", str(tmp_path / "cache"))
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("notebook", [pytest.param(p, id=p.name) for p in NOTEBOOKS])
def test_the_cells_of_a_notebook_run(notebook, tmp_path, monkeypatch):
    pytest.importorskip("tf2onnx", reason="needs the extra 'onnx'")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}, cell {number}", "exec"), namespace)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES])
def test_links_lead_to_files(page):
    targets = [page.parent / target for target in _LINK.findall(page.read_text())]
    assert [target for target in targets if not target.exists()] == []


@pytest.mark.backends("tensorflow")
def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
