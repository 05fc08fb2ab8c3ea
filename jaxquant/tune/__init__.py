"""Accuracy control: which sites stay float so that a metric, or the speed, is what was asked for.

This package knows the steps of a quantization and nothing of how their results are shown.
"""
