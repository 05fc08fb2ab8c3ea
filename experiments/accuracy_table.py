r"""Measures every network under every method, and writes the table of README.

  python experiments/accuracy_table.py --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

Networks run side by side, each in a process of its own, as cores and memory allow. What is finished
is kept in the work folder and not measured again, so an interrupted run goes on where it stopped; a
change of the library, of the weights or of the images makes new rows. A network without weights has
a row that says how to get them. The settings are those of `configs/accuracy_table.py`.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

from experiments.accuracy import markdown, methods, table

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file(
    "config", str(CONFIGS / "accuracy_table.py"), "Settings.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "runs/accuracy_table", "Where finished rows are kept.")
MODELS = flags.DEFINE_list("models", [], "Networks of the zoo; --config.models if empty.")
METHODS = flags.DEFINE_list("methods", [], "Methods of the table; all if empty.")
RECOVER = flags.DEFINE_list(
    "recover",
    [],
    "Recoveries to measure each method with: 'none' or steps joined by '+', such as "
    "none,bias_correction,equalization+bias_correction; if empty, each method has its own.",
)
MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Markdown file, such as README.md; by default table.md in the work folder."
)
JSONL = flags.DEFINE_string(
    "jsonl", None, "JSON-lines file; by default rows.jsonl in the work folder."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List what would run, and run nothing.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; settings are given as --config.NAME=")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # else: platforms tried
    jax.config.update("jax_platforms", "cpu")  # of this process, which only counts and waits
    workdir = Path(WORKDIR.value)
    table_file = Path(MARKDOWN.value or workdir / "table.md")
    rows_file = Path(JSONL.value or workdir / "rows.jsonl")
    try:
        markdown.around(table_file)  # before hours of work, not after
        chosen = methods.with_recovery(methods.choose(METHODS.value), RECOVER.value)
        plan = table.make_plan(CONFIG.value, MODELS.value, chosen, workdir)
    except (*table.EXPECTED, ValueError) as error:
        sys.exit(f"error: {error}")
    if DRY_RUN.value:
        print(table.describe(plan))
        return
    failures = table.run(plan)
    text = table.finish(plan, failures, table_file, rows_file)
    print(f"\n{text}\nkept in {workdir}/")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}; run again to go on with them")


if __name__ == "__main__":
    app.run(main)
