"""Compiles forms for a device, and prints of each what products it has: a line of JSON each.

    python -m tests.accelerators.compile_forms v5e FORM...

A compiler that aborts ends this process; the lines of the forms before are out then.
"""

import json
import sys

from experiments.benchmarks import described
from tests.accelerators import forms


def main(device: str, *names: str) -> None:
    for name in names:
        function, args = forms.form(name)
        try:
            found = {"products": described.products(described.compiled(device, function, *args))}
        except Exception as error:  # whatever a compiler says, the next form is compiled too
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
