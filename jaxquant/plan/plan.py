"""The plan of a quantization: plain data, hashable and JSON-able."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxquant.code_tables import INT
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan.modes import STATIC
from jaxquant.plan.rules import RECOVERY_STEPS

VERSION = 3
INT8, FLOAT = "int8", "float"
# What runs the model: LiteRT's int8 kernels give int8 alone.
ANY, LITERT = "any", "litert"


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor that is quantized from float.

    Tensors of one `family` share their threshold and grid; the family is named after its first.
    value = (int8 - zero_point) * scale; see `jaxquant.plan.grid`.  A divided tensor has a scale
    for each index along the axes `channels`, which `qparams` holds; then `scale` is that which the
    weights behind it know, who carry the rest (`jaxquant.weights.quantize`).  A `symmetric`
    one has zero point 0 because that was asked for.

    A tensor inside a scan over stacked weights has one for each layer: `layer` are its numbers,
    those of the outermost scan first, and the name ends in them: "blocks/mlp/input[3]".
    """

    name: str
    family: str
    threshold: float
    scale: float
    zero_point: int
    channels: tuple[int, ...] = ()
    symmetric: bool = False
    layer: tuple[int, ...] = ()

    def in_layer(self, layer: tuple[int, ...]) -> TensorPlan:
        """The same with the names that it has among those of all layers."""
        suffix = layer_suffix(layer)
        return dataclasses.replace(
            self, name=self.name + suffix, family=self.family + suffix, layer=layer
        )

    def by_itself(self) -> TensorPlan:
        """The same with the names that it has in its own layer."""
        return dataclasses.replace(self, name=self.base, family=self.base_family, layer=())

    @property
    def base(self) -> str:
        """The name that it shares with the other layers, under which its arrays are stacked."""
        return self.name.removesuffix(layer_suffix(self.layer))

    @property
    def base_family(self) -> str:
        """The name that its family shares with those of the other layers, as sites know it."""
        return self.family.removesuffix(layer_suffix(self.layer))


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """One site: int8 with the families of its inputs and its epilogue, or float with a reason.

    `reason` is why it is float, "" for an int8 site.  `affine` are the operations that the
    multiplier and bias absorb, `activation` the elementwise ones behind them; `fingerprint` is of
    how the weight and the affine operands are computed, "" for a site that does not accumulate;
    `computes_weight`: see `jaxquant.graph.sites.Site`.  `recover` are the steps that may repair an
    int8 site, `weight_bits` those of its stored weight, `weight_dtype` what they are; `dynamic`:
    what it reads is scaled in each call; `asymmetric`: with a zero point for each row, where it is
    scaled in the call.
    """

    name: str
    kind: str
    scope: str
    weight_path: str
    reason: str
    inputs: tuple[str, ...]
    affine: tuple[str, ...]
    activation: tuple[str, ...]
    fingerprint: str
    computes_weight: bool = False
    recover: tuple[str, ...] = ()
    weight_bits: int = 8
    weight_dtype: str = INT
    dynamic: bool = False
    asymmetric: bool = False

    @property
    def status(self) -> str:
        """`INT8` or `FLOAT`."""
        return FLOAT if self.reason else INT8


@dataclasses.dataclass(frozen=True)
class PlannedCut:
    """A stacked parameter that is cut in segments of layers; see `jaxquant.graph.cuts`.

    `bounds` are the first layers of the segments, and how many layers there are.
    """

    path: str
    bounds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which sites are int8, and with which scales.

    `kinds` are those that were asked for; `mode` is a key of `jaxquant.plan.modes.MODES`;
    `algo` is that of tensors for which no rule names another; `group_size` (None: a scale per
    channel) is of weight-only quantization; `cuts` are of parameters whose layers are in segments;
    `target` is that of `QuantConfig`.
    """

    sites: tuple[SitePlan, ...]
    tensors: tuple[TensorPlan, ...]
    kinds: tuple[str, ...]
    weight_quantize_type: str
    algo: str
    mode: str = STATIC
    group_size: int | None = None
    cuts: tuple[PlannedCut, ...] = ()
    target: str = ANY
    version: int = VERSION

    @property
    def recover(self) -> tuple[str, ...]:
        """The recovery steps that some site has, in their order."""
        asked = {step for site in self.sites for step in site.recover}
        # In their own order, whatever the user's was.
        return tuple(step for step in RECOVERY_STEPS if step in asked)

    def recovered_by(self, step: str) -> frozenset[str]:
        """The names of the sites that have a recovery step."""
        return frozenset(site.name for site in self.sites if step in site.recover)

    @property
    def cut_at(self) -> dict[str, tuple[int, ...]]:
        """Path of a parameter -> the bounds of its segments."""
        return {cut.path: cut.bounds for cut in self.cuts}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        data: dict[str, Any] = json.loads(text)
        # A newer plan may hold what this release would pass over.
        if data.get("version") != VERSION:
            raise ValueError(f"plan version {data.get('version')!r}; this release reads {VERSION}")
        sites = tuple(SitePlan(**_with_tuples(site)) for site in data.pop("sites"))
        tensors = tuple(TensorPlan(**_with_tuples(t)) for t in data.pop("tensors"))
        cuts = tuple(PlannedCut(**_with_tuples(cut)) for cut in data.pop("cuts", ()))
        return Plan(sites=sites, tensors=tensors, cuts=cuts, **_with_tuples(data))


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
