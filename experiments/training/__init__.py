"""What `experiments/train.py` is made of, from the batches to the checkpoints.

`B` is the batch, `S` the side of the images, `K` the number of classes.
"""

from experiments.errors import ExperimentError


class TrainingError(ExperimentError):
    """Settings that cannot be trained with, or a run that cannot go on."""
