"""Settings for some of the sites, by patterns on their names: `jaxquant.Rule`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxquant.calibration.observers import OBSERVERS, Observer
from jaxquant.errors import nearest
from jaxquant.graph import kinds
from jaxquant.graph.patterns import lacking_layers, matches, matches_layer
from jaxquant.graph.sites import Site

DTYPES = ("int8", "float")
# The recovery steps in their order: name -> the module of `jaxquant.recover` that has its `STEP`.
RECOVERY_STEPS: Mapping[str, str] = {
    "awq": "awq",
    "gptq": "gptq",
    "equalization": "equalization",
    "smoothquant": "equalization",
    "adaround": "rounding",
    "bias_correction": "bias_correction",
}
# Those of `jaxquant.quant_weights`; the others are of `jaxquant.quant_post`.
STEPS_OF_WEIGHTS = ("awq", "gptq")
# Not a step on the int8 model, but a choice before it: see `jaxquant.tune.outliers`.
OUTLIERS = "outliers"
WEIGHT_BITS = (8, 4)
PREFIXES = ("kind:", "module:", "site:")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is set for the sites that a pattern matches.

    Of several rules that set the same thing for a site, the last one wins; what a rule leaves None
    stays as the rules before it, and the configuration, have it.  `algo` and `symmetric` are of the
    tensors that the sites read: where sites read one tensor, or tensors that share a scale, the
    last rule that matches any of them wins.

    Attributes:
      pattern: a glob on the site's name, its parameter's path or its scope ("block1/*"), on its
        kind ("kind:softmax") or on the Flax module classes that it is in ("module:SelfAttention");
        or exactly its name ("site:block1/Conv_0").  Behind the pattern of a site inside a scan over
        stacked weights layers may follow, "layers/mlp[3]", "layers/*[0:4]", "layers/mlp[-1]"; where
        scans are nested one pair of brackets for each, the outermost first.  Layers that differ in
        more than algo and symmetric are cut off into a scan of their own, where that can be (the
        scan is not inside another loop, and goes over parameters as they are); its sites are named
        after their layers, "layers/mlp[4:12]".  A pattern that matches no site, or no layer of it,
        is an error.
      dtype: "float", or "int8" where a rule before, `skip` or `skip_first_last` says "float".
      algo: how thresholds are chosen, as in `jaxquant.quant_post`.
      symmetric: whether the grids have zero point 0 always.
      dynamic: whether what these convolutions and dots read is scaled in each call, by the range
        of every sample or row (each token of a transformer), as `jaxquant.quant_dynamic` does,
        and not by a threshold of calibration.  It pays where few rows are far larger than the
        others, and costs time.
      recover: the recovery steps at these sites, () for none.  A tensor is equalized where all
        sites that read it have the step.  In `jaxquant.quant_weights` "awq" and "gptq".
      weight_bits: 8, or in `jaxquant.quant_weights` also 4.
      reason: why, for the report; "" for the rule itself.

    Raises:
      ValueError: a setting is not known, or none is set.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> params = {"body": {"w": jnp.eye(4)}, "head": {"w": jnp.eye(4)}}
      >>> qparams, qapply = jaxquant.quant_post(
      ...     params, lambda p, x: x @ p["body"]["w"] @ p["head"]["w"], [jnp.ones((2, 4))],
      ...     algo="mse", rules=[jaxquant.Rule("body", algo="abs_max"),
      ...                        jaxquant.Rule("head", dtype="float")], progress=False)
      >>> [(row["name"], row["status"], row["reason"]) for row in qapply.report().rows]
      [('body', 'int8', ''), ('head', 'float', "rule 'head'")]
    """

    pattern: str
    _: dataclasses.KW_ONLY
    dtype: str | None = None
    algo: str | Observer | None = None
    symmetric: bool | None = None
    dynamic: bool | None = None
    recover: Sequence[str] | None = None
    weight_bits: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        check_pattern("Rule(pattern)", self.pattern)
        if self.recover is not None:
            object.__setattr__(self, "recover", steps("recover", self.recover))
        # A rule without a setting matches sites and changes nothing: a keyword was forgotten.
        if all(getattr(self, name) is None for name in SETTINGS):
            raise ValueError(f"Rule({self.pattern!r}) sets nothing: give {', '.join(SETTINGS)}")
        if self.dtype is not None:
            check_known("dtype", self.dtype, DTYPES)
        if self.algo is not None and not isinstance(self.algo, Observer):
            check_known("algo", self.algo, OBSERVERS)
        for name in ("symmetric", "dynamic"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is True or False, got {getattr(self, name)!r}")
        if self.weight_bits is not None:
            check_weight_bits(self.weight_bits)
        if not isinstance(self.reason, str):
            raise ValueError(f"reason is a text, got {self.reason!r}")


SETTINGS = ("dtype", "algo", "symmetric", "dynamic", "recover", "weight_bits")
# What all layers of a scan have in common.
SHARED_SETTINGS = ("dtype", "dynamic", "recover", "weight_bits")


def setting(rules: Sequence[Rule], places: Iterable[int], name: str, otherwise: Any) -> Any:
    """What the last of the rules at these places that sets something says, else `otherwise`.

    Example:
      >>> rules = [Rule("*", algo="mse"), Rule("a", algo="KL"), Rule("a", dtype="float")]
      >>> setting(rules, [0, 1, 2], "algo", "avg"), setting(rules, [2], "algo", "avg")
      ('KL', 'avg')
    """
    # From the last rule on.
    for place in sorted(places, reverse=True):
        value = getattr(rules[place], name)
        if value is not None:
            return value
    return otherwise


def matching(rules: Sequence[Rule], site: Site, layer: Sequence[int]) -> tuple[int, ...]:
    """The places of the rules that match a site in one layer of the scans around it."""
    places = enumerate(rules)
    return tuple(place for place, rule in places if matches_layer(site, rule.pattern, layer))


def first_layer(site: Site) -> tuple[int, ...]:
    """A layer of a site, for what is set for all layers alike."""
    return (0,) * len(site.scans)


def check_rules(found: Sequence[Site], rules: Sequence[Rule], possible: Collection[str]) -> None:
    """Raise ValueError where a rule says nothing of any site.

    Args:
      found: the sites of the model.
      rules: those of the user.
      possible: the kinds that may become int8.
    """
    for rule in rules:
        sites = [site for site in found if matches(site, rule.pattern)]
        if not sites:
            raise ValueError(
                f"rule {rule.pattern!r} matches no site{_nearest(found, rule.pattern)}"
            )
        # What kinds of sites these are says whether the rule can have an effect.
        there = sorted({site.kind for site in sites})
        # A rule that can have no effect is an error, as a misspelt name would be.
        if rule.dtype == "int8" and not set(possible) & set(there):
            raise ValueError(
                f"rule {rule.pattern!r} says dtype='int8' of sites of the kinds "
                f"{', '.join(there)}, none of which is in quantizable_op_type; add it there, or "
                "give is_full_quantize=True"
            )
        if rule.dynamic and not set(kinds.DOT_KINDS) & set(there):
            raise ValueError(
                f"rule {rule.pattern!r} sets dynamic, which is of convolutions and dots; it "
                f"matches sites of the kinds {', '.join(there)}"
            )
        for name in ("recover", "weight_bits"):
            if getattr(rule, name) and not any(site.stores_weight for site in sites):
                raise ValueError(
                    f"rule {rule.pattern!r} sets {name}, which is of sites with a weight; it "
                    f"matches none, but {', '.join(there)}"
                )


def check_skip(found: Sequence[Site], patterns: Sequence[str]) -> None:
    """Raise ValueError where a pattern matches no site, with the names nearest to it."""
    for pattern in patterns:
        if not any(matches(site, pattern) for site in found):
            raise ValueError(f"skip pattern {pattern!r} matches no site{_nearest(found, pattern)}")


def _nearest(found: Sequence[Site], pattern: str) -> str:
    # Layers that are not there go first: the name is right then, and no other is nearer.
    if lacking := lacking_layers(found, pattern):
        return lacking
    prefix, _, _ = pattern.partition(":")
    if prefix == "kind":
        names = [f"kind:{k}" for k in sorted({site.kind for site in found})]
    elif prefix == "module":
        names = [f"module:{m}" for m in sorted({m for s in found for m in s.modules})]
    else:
        start = "site:" if prefix == "site" else ""
        # Shape operations are many, and hardly meant.
        names = [start + site.name for site in found if not kinds.is_layout(site.kind)]
    return nearest(pattern, names)


def check_pattern(argument: str, pattern: object) -> None:
    """Raise ValueError where something is no pattern of sites."""
    if not isinstance(pattern, str) or pattern in ("", *PREFIXES):
        raise ValueError(
            f"{argument} holds glob patterns on site names, and 'site:', 'kind:' or 'module:' with "
            f"one behind it; got {pattern!r}"
        )


def steps(argument: str, value: Any) -> tuple[str, ...]:
    """Recovery steps as a tuple, checked."""
    for step in (found := names(argument, value)):
        check_known(argument, step, (OUTLIERS, *RECOVERY_STEPS))
    return found


def names(argument: str, value: Any) -> tuple[str, ...]:
    """A sequence of names as a tuple; raises ValueError for a single one."""
    # A string is a sequence of letters, none of which is a name.
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(
            f"{argument} is a sequence of names, got {value!r}; write ({value!r},) for one"
        )
    return tuple(value)


def check_weight_bits(value: object) -> None:
    """Raise ValueError where weights are not stored in so many bits."""
    # True is an int, and no number of bits.
    if type(value) is not int or value not in WEIGHT_BITS:
        raise ValueError(f"weight_bits is 8 or 4, got {value!r}")


def check_known(argument: str, value: object, valid: Iterable[str]) -> None:
    """Raise ValueError, with the nearest names, where a value is not among the valid ones."""
    known = list(valid)
    if value in known:
        return
    raise ValueError(f"{argument}: {value!r} is not known{nearest(str(value), known)}")
