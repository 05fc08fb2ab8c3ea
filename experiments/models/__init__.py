"""Image classifiers in Flax, one file a family, in inference mode unless `train=True` is passed.

Every network maps images [B, H, W, C] to logits [B, K]; `B` is the batch, `K` the number of
classes.
"""
