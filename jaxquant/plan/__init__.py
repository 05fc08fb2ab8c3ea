"""The plan: which sites become int8, with which scale, and why the others do not.

This package knows graphs, thresholds and what the user asked for; it touches no array.
"""
