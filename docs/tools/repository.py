"""The address of the repository stands in `pyproject.toml` alone, under [project.urls].

  python docs/tools/repository.py

writes it to where people copy it from: README.md (what to clone, and the badge that opens the
notebook in Colab) and the notebook. Until there is one, they say how to install from a clone.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README, NOTEBOOK = Path("README.md"), Path("notebooks/quantize.ipynb")
BEGIN, END = "<!-- install: docs/tools/repository.py -->", "<!-- install: end -->"
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?")


def address(root: Path = ROOT) -> str:
    """What `git clone` takes; "" until there is an address."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def badge(url: str) -> str:
    """The picture that opens the notebook in Colab, which takes addresses of GitHub."""
    found = GITHUB.fullmatch(url)
    if found is None:
        return ""
    colab = f"https://colab.research.google.com/github/{found[1]}/blob/main/{NOTEBOOK}"
    return f"[![In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"


def readme(text: str, url: str) -> str:
    """README.md with that address."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    if url:
        folder = url.rstrip("/").removesuffix(".git").rpartition("/")[-1]
        said = f"{badge(url)}\n\n```sh\ngit clone {url} && cd {folder}\n```"
    else:
        said = "No address is public yet. In your clone of this repository:"
    return f"{before}{BEGIN}\n{said.strip()}\n{END}{after}"


def notebook(text: str, url: str) -> str:
    """The notebook with that address: in its first text and its first code."""
    book = json.loads(text)
    head, first = book["cells"][:2]
    how = "In Colab run all cells."
    if not url:
        how = "In Colab set `REPOSITORY` to the address of the repository, and run all cells."
    head["source"][-1] = f"{how} {badge(url)}".strip()
    first["source"] = [
        re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{url}"', line) for line in first["source"]
    ]
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


WRITERS = {README: readme, NOTEBOOK: notebook}


def write(root: Path = ROOT) -> None:
    """Writes the address of `pyproject.toml` to the other files."""
    for path, writer in WRITERS.items():
        file = root / path
        file.write_text(writer(file.read_text(encoding="utf-8"), address(root)), encoding="utf-8")


def on_config(config: Any) -> Any:
    """For the pages: sets the link to the repository, once there is an address."""
    config.repo_url = address() or None
    return config


if __name__ == "__main__":
    write()
