"""For the API reference: the examples of a docstring are code, though its section is "Example:"."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the sections the name by which the parser of docstrings knows them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )
