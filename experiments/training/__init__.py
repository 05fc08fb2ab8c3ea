"""What `experiments/train.py` is made of, from the batches to the checkpoints.

`B` is the batch, `S` the side of the images, `K` the number of classes.
"""


class TrainingError(ValueError):
    """Settings that cannot be trained with, or a run that cannot go on."""
