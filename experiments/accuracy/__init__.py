"""The parts of `experiments/accuracy_table.py`: every network under every method, measured once."""
