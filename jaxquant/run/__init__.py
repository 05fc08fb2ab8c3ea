"""Execution: the int8 operations, their lowering, and `qapply`."""
