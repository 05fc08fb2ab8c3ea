"""README.md, the notebook and the Colab badge take the repository's address from pyproject.toml."""

import importlib.util
import json
import re
import shutil

import pytest

from tests.docs.test_examples import ROOT

_SPEC = importlib.util.spec_from_file_location("repository", ROOT / "docs/tools/repository.py")
repository = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(repository)

FILES = ("pyproject.toml", *map(str, repository.WRITERS))


@pytest.fixture
def clone(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_address(clone, url):
    file = clone / "pyproject.toml"
    without = re.sub(r"^\[project\.urls\]\n(?:[^\[\n].*\n)*", "", file.read_text(), flags=re.M)
    file.write_text(f'{without}\n[project.urls]\nRepository = "{url}"\n')


def test_the_files_hold_the_address_of_pyproject(clone):
    repository.write(clone)
    for name in FILES:
        assert (clone / name).read_text() == (ROOT / name).read_text(), "run the script"


@pytest.mark.skipif(bool(repository.address()), reason="there is an address")
def test_without_an_address_they_say_how_to_install_from_a_clone():
    assert "In your clone of this repository:" in (ROOT / "README.md").read_text()
    assert 'REPOSITORY = ""' in "".join(first_cells(ROOT)[1]["source"])


@pytest.mark.parametrize("ending", ["", ".git", "/"])
def test_an_address_goes_everywhere(clone, ending):
    url = f"https://github.com/someone/jaxquant{ending}"
    set_address(clone, url)
    repository.write(clone)
    colab = "https://colab.research.google.com/github/someone/jaxquant/blob/main/notebooks/"
    readme, (head, code) = (clone / "README.md").read_text(), first_cells(clone)
    assert f"git clone {url} && cd jaxquant\n" in readme
    assert f"({colab}quantize.ipynb)" in readme
    assert f"({colab}quantize.ipynb)" in "".join(head["source"])
    assert f'REPOSITORY = "{url}"' in "".join(code["source"])


def test_an_address_outside_github_has_no_badge(clone):
    set_address(clone, "https://example.org/jaxquant")
    repository.write(clone)
    readme = (clone / "README.md").read_text()
    assert "git clone https://example.org/jaxquant && cd jaxquant\n" in readme
    assert "colab" not in readme


def first_cells(root):
    return json.loads((root / "notebooks/quantize.ipynb").read_text())["cells"][:2]
