"""The networks of the experiments in Flax, one file a family.

Image classifiers map images [B, H, W, C] to logits [B, K], in inference mode unless `train=True` is
passed; networks of text map ids of tokens [B, T] to logits [B, T, K].  `B` is the batch, `T` the
length of a text, `K` the number of classes.
"""
