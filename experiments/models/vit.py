"""A vision transformer: patches of an image as tokens, beside them one that gathers the class.

After Dosovitskiy et al. (arXiv:2010.11929).  `L` is the number of layers, `D` the width, `F` the
features between the two dense layers, `P` the size of a patch, `N` the number of patches.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.transformer import Block, scanned


class Vit(nn.Module):
    """Images [B, H, W, C], whose sides P divides -> logits [B, num_classes].

    Attributes:
      num_classes: K.
      patch: P.
      layers: L.
      width: D.
      heads: of each attention.
      hidden: F.
      scanned: True: one `nn.scan` over the layers, whose parameters are stacked, [L, ...], under
        "layers"; False: a Python loop over "layers_0" to "layers_{L-1}".  `stack` and `unstack` in
        `experiments.models.transformer` make the parameters of one those of the other.
    """

    num_classes: int = 10
    patch: int = 4
    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int = 256
    scanned: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        sides = (self.patch, self.patch)
        patches = nn.Conv(self.width, sides, sides, padding="VALID", name="patches")(images)
        batch, rows, columns, _ = patches.shape
        x = patches.reshape(batch, rows * columns, self.width)
        gatherer = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(gatherer, (batch, 1, self.width)), x], axis=1)
        shape = (1, *x.shape[1:])
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        settings = {"heads": self.heads, "hidden": self.hidden}
        if self.scanned:
            x, _ = scanned(Block, self.layers)(**settings, name="layers")(x, None)
        else:
            for number in range(self.layers):
                x, _ = Block(**settings, name=f"layers_{number}")(x, None)
        return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])
