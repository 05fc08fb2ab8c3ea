"""Settings of `experiments/train.py`, one file a family over the common base."""
