"""The measurements of a run, one JSON object a line."""

import json
from pathlib import Path

from experiments.files import write_text

FILE = "metrics.jsonl"


class Log:
    """metrics.jsonl of a work folder; what an interrupted run wrote after `step` is taken out."""

    def __init__(self, workdir: Path, step: int) -> None:
        self._path = workdir / FILE
        kept = [line for line in read(workdir) if line["step"] <= step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **values: float) -> None:
        """Appends one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read(workdir: Path) -> list[dict[str, float]]:
    """The lines of a run, without a last one that was cut short."""
    path = workdir / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    measured = []
    for i, line in enumerate(lines):
        try:
            measured.append(json.loads(line))
        except json.JSONDecodeError:
            if i < len(lines) - 1:
                raise
    return measured
