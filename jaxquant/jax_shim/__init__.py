"""The only room that touches JAX internals, a file for each purpose.

Everything else in the package sees JAX through its public API and through the functions here, so
that a new JAX release is absorbed here.  Checked on jax 0.10.2 and 0.12.0.
"""
