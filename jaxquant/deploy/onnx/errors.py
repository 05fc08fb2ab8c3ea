"""What the export does not cover."""


class NotCovered(Exception):
    """An operation, or a form of it, that the export does not cover; the message says which."""
