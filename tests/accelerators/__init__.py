"""What int8 programs become on devices that are not here: compiled ahead of time, not run.

`.ci/accelerators` makes the environment and runs these.
"""
