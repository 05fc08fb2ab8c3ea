"""The only room that touches JAX internals, a file for each purpose.

Everything else in the package sees JAX through its public API and through the functions here, so
that a new JAX release is absorbed here.  Tested with jax 0.10.2 on Python 3.11, and with jax
0.12.0.1 on Python 3.13 (`.ci/newest`).
"""
