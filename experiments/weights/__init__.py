"""Readers that turn weight files, in the formats that users have, into Flax variables.

A format's reader (`torch_pth`, `keras`, …) gives a flat mapping of the file's own names to NumPy
arrays; `tree.assemble` puts them into the tree of a model.
"""
