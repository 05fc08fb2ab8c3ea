r"""Measures every network under every method, and writes the table of docs/results.md.

  python experiments/accuracy_table.py --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

Networks run side by side, each in a process of its own, as cores and memory allow. What is finished
is kept in the work folder and not measured again, so an interrupted run goes on where it stopped; a
change of the library, of the weights or of the images makes new rows. A network without weights has
a row that says how to get them. --help lists the settings.
"""

import sys
from pathlib import Path

import jax
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

from configs import accuracy_table as defaults
from experiments import program
from experiments.accuracy import markdown, methods, table


def main() -> None:
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # of this process, which only counts and waits
    workdir = Path(given.workdir)
    table_file = Path(given.markdown or workdir / "table.md")
    rows_file = Path(given.jsonl or workdir / "rows.jsonl")
    markdown.around(table_file)  # before hours of work, not after
    chosen = methods.with_recovery(methods.choose(given.methods), given.recover)
    plan = table.make_plan(program.config(), given.models, chosen, workdir)
    if given.dry_run:
        print(table.describe(plan))
        return
    failures = table.run(plan)
    text = table.finish(plan, failures, table_file, rows_file)
    print(f"\n{text}\nkept in {workdir}/")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}; run again to go on with them")


def define_flags() -> None:
    """Define the flags beside `--config`."""
    flags.DEFINE_string("workdir", "runs/accuracy_table", "Where finished rows are kept.")
    flags.DEFINE_list("models", [], "Networks of the zoo; --config.models if empty.")
    flags.DEFINE_list("methods", [], "Methods of the table; all if empty.")
    flags.DEFINE_list(
        "recover",
        [],
        "Recoveries to measure each method with: 'none' or steps joined by '+', such as "
        "none,bias_correction,equalization+bias_correction; if empty, each method has its own.",
    )
    flags.DEFINE_string(
        "markdown",
        None,
        "Markdown file, as docs/results.md; by default table.md in the work folder.",
    )
    flags.DEFINE_string("jsonl", None, "JSON-lines file; by default rows.jsonl in the work folder.")
    flags.DEFINE_bool("dry_run", False, "List what would run, and run nothing.")


if __name__ == "__main__":
    program.define_config(defaults.SETTINGS, defaults.__file__)
    define_flags()
    program.start(main)
