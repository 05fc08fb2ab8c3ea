"""Repair of an int8 model by comparing it with the float model on calibration data."""
