"""The plan: which sites become int8, with which scale, and why the others do not.

This package knows graphs, thresholds and the configuration; it touches no array.
"""
