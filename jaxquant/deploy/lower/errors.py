"""What an export does not cover."""


class NotCovered(Exception):
    """An operation, or a form of it, that an export does not cover; the message says which."""
