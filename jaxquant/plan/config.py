"""What the user asked for, checked once: `jaxquant.QuantConfig`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.calibration.observers import OBSERVERS, Observer, find_observer
from jaxquant.code_tables import BLOCK, INT, MXFP4, VALUES
from jaxquant.graph.kinds import PADDLE_NAMES
from jaxquant.plan.checks import check_flag, check_group_size, check_kind, check_percent
from jaxquant.plan.modes import DYNAMIC, MODES, STATIC, WEIGHT_ONLY
from jaxquant.plan.plan import ANY, LITERT
from jaxquant.plan.rules import (
    OUTLIERS,
    STEPS_OF_WEIGHTS,
    Rule,
    check_known,
    check_pattern,
    check_weight_bits,
    names,
    steps,
)

DEFAULT_OP_TYPES = ("conv2d", "depthwise_conv2d", "mul", "lookup_table")
WEIGHT_QUANTIZE_TYPES = ("channel_wise_abs_max", "abs_max")
ACTIVATION_QUANTIZE_TYPES = ("asymmetric", "symmetric", "dynamic")
OPTIMIZE_FOR = ("size", "speed")
TARGETS = (ANY, LITERT)
DEFAULT_RECOVERY = (OUTLIERS, "bias_correction")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized; what `jaxquant.quant_post` takes as `config`, or as keywords.

    Plain data: frozen, comparable, and written as JSON and read again by `to_json` and
    `from_json`.  `dataclasses.replace` makes another one.

    Attributes:
      algo: how the thresholds are chosen, the largest |x| that each int8 tensor keeps:
        "KL" (the default, see `jaxquant.kl_threshold`) and "KL:paddle-3.3", "KL:paddle-1.6",
        "KL:nvidia", which search like those; "abs_max", also "direct" or "min_max": no clipping;
        "avg": the mean over the samples of their largest |x|; "hist", also "percentile": see
        `hist_percent`; "mse": least squared error; "emd": least change of mean and deviation;
        "ptf": the largest |x| over a power of two, by squared error; "auto": least squared error
        with clipping weighing 16 times; or a `jaxquant.Observer` of one's own.
      hist_percent: the fraction of the values that "hist" keeps, in (0, 1]; not a percentage, in
        spite of the name, which is PaddleSlim's.
      quantizable_op_type: the kinds that become int8, by PaddleSlim's names; "lookup_table", an
        embedding, is stored in int8 and gives floats.
      is_full_quantize: all kinds become int8, so that tensors stay int8 between sites: pooling,
        additions, concatenation, softmax, interpolation, shape operations, ...
      weight_quantize_type: "channel_wise_abs_max" (a scale per output channel) or "abs_max".
      activation_quantize_type: "asymmetric" (a zero point where that makes the steps smaller: all
        256 integers for what is never negative) or "symmetric"; or "dynamic": what convolutions and
        dots read is scaled in each call, as `jaxquant.quant_dynamic` does, but where a rule says
        `Rule(dynamic=False)`.
      recover: what repairs the int8 model, () for nothing; always in this order:
        "outliers" looks for dots that read a tensor of which a few channels or rows are far larger
        than all others, as in transformers, and gives them "equalization" where that halves the
        noise at their outputs, or a scale for each row (`Rule(dynamic=True)`) where that halves it
        again; the report's `rules` say where;
        "equalization" gives each input channel of a convolution or dot a step of its own where
        that lessens the error at the outputs, tried on samples (Nagel et al., 2019);
        "smoothquant" does so at dots alone, with its paper's exponent (Xiao et al., 2023);
        "adaround" learns for each weight whether to round down or up (Nagel et al., 2020), with
        optax (the extra "recover"), in seconds to a minute a site; a site where the
        error on held-out samples does not fall keeps nearest rounding;
        "bias_correction" takes away the mean error of each output channel.
        They use up to 64 samples that calibration kept.
      skip: patterns of sites that stay float, as of `jaxquant.Rule`: `Rule(pattern, dtype="float")`
        for each, before `rules`.  So does everything under `jax.named_scope("skip_quant")`.
      skip_first_last: the first and the last convolution or dot with a weight stay float.
      optimize_for: "size": whatever can becomes int8.  "speed": every convolution and dot is timed
        on this machine in float and in int8, in the shapes of the first batch (so calibrate in the
        batch size that the model will serve), and stays float where int8 takes longer; the report
        says so, with the ratio.  Each different site costs about a second.  The result depends on
        the timing: another call may leave other sites in float.
      target: what will run the model.  "litert" is for `jaxquant.export_litert`: LiteRT's int8
        kernels round what they give, so what a convolution, a dot with a weight or a mean gives is
        rounded to an int8 grid, for outputs and float operations too, and so is all that is added
        where additions are int8 (`is_full_quantize`).  "any" keeps float32 there.
      rules: settings for some of the sites, each a `jaxquant.Rule`; the last that matches wins.
      mode: how sites compute: "static" of `jaxquant.quant_post`; the others are those of
        `jaxquant.quant_dynamic` and `jaxquant.quant_weights`.
      weight_bits, group_size, weight_dtype: as of `jaxquant.quant_weights`.

    Raises:
      ValueError: a setting is not valid, or not in this mode.

    Example:
      >>> import jaxquant
      >>> config = jaxquant.QuantConfig(
      ...     algo="KL", rules=(jaxquant.Rule("head/*", dtype="float"),
      ...                       jaxquant.Rule("block3/*", algo="mse", symmetric=True)))
      >>> jaxquant.QuantConfig.from_json(config.to_json()) == config
      True
    """

    algo: str | Observer = "KL"
    hist_percent: float = 0.99999
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES
    is_full_quantize: bool = False
    weight_quantize_type: str = "channel_wise_abs_max"
    activation_quantize_type: str = "asymmetric"
    recover: Sequence[str] = DEFAULT_RECOVERY
    skip: Sequence[str] = ()
    skip_first_last: bool = False
    optimize_for: str = "size"
    target: str = ANY
    rules: Sequence[Rule] = ()
    mode: str = STATIC
    weight_bits: int = 8
    group_size: int | None = None
    weight_dtype: str = INT

    @property
    def own_observer(self) -> Observer | None:
        """The observer among `algo` and those of the rules that keeps statistics of its own."""
        return next((o for o in map(self.observer_of, self.algos) if not o.keeps_histogram), None)

    @property
    def algos(self) -> tuple[str | Observer, ...]:
        """All that are named, each once."""
        named = (rule.algo for rule in self.rules if rule.algo is not None)
        return tuple(dict.fromkeys((self.algo, *named)))

    def observer_of(self, algo: str | Observer) -> Observer:
        """What chooses the thresholds by `algo`."""
        return find_observer(algo, self.hist_percent)

    @property
    def algo_name(self) -> str:
        return name_of(self.algo)

    @functools.cached_property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules with those that `skip` stands for; the first pattern of it names the reason."""
        # In reverse, since the last rule that matches wins: the first pattern is the one to be
        # named.
        skips = [Rule(p, dtype="float", reason=f"skip={p!r}") for p in reversed(self.skip)]
        return (*skips, *self.rules)

    @property
    def all_steps(self) -> tuple[str, ...]:
        """The recovery steps that are asked for at some site or other."""
        ruled = [step for rule in self.rules for step in rule.recover or ()]
        return tuple(dict.fromkeys((*self.recover, *ruled)))

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that become int8."""
        # Full mode means all kinds of the mode, in later releases too.
        return frozenset(
            MODES[self.mode].kinds if self.is_full_quantize else self.quantizable_op_type
        )

    def with_rules(self, rules: Sequence[Rule]) -> QuantConfig:
        """The configuration with more rules, behind its own."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    def to_json(self) -> str:
        """The configuration as JSON.

        Raises:
          ValueError: an `algo` is an observer of one's own, which no text holds.
        """
        own = [algo for algo in self.algos if isinstance(algo, Observer)]
        if own:
            raise ValueError(
                "an Observer of your own cannot be written as JSON; write the configuration with "
                "the name of an algo, and put the observer in with dataclasses.replace"
            )
        # By fields, so that a new setting is written without a line here.
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["rules"] = [rule_data(rule) for rule in self.rules]
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str) -> QuantConfig:
        """What `to_json` wrote, checked as any configuration is."""
        data = json.loads(text)
        if not isinstance(data, Mapping) or not isinstance(data.get("rules", []), list):
            raise ValueError("this is no QuantConfig: not an object with a list of rules")
        known = {field.name for field in dataclasses.fields(QuantConfig)}
        for name in data:
            check_known("QuantConfig", name, known)
        # JSON has lists for tuples; the constructor takes both.
        settings = {name: value for name, value in data.items() if name != "rules"}
        return QuantConfig(**settings, rules=[Rule(**rule) for rule in data.get("rules", [])])

    def __post_init__(self) -> None:
        if not isinstance(self.algo, Observer):
            check_known("algo", self.algo, OBSERVERS)
        check_percent(self.hist_percent)
        # Frozen, so what is given as a list or a single name is put into its one form here.
        for name in ("quantizable_op_type", "skip"):
            object.__setattr__(self, name, names(name, getattr(self, name)))
        object.__setattr__(self, "recover", steps("recover", self.recover))
        check_known("mode", self.mode, MODES)
        self._check_steps("recover", self.recover)

        # After the mode is known to be one: kinds are looked up in it.
        self._take_kinds()
        check_weight_bits(self.weight_bits)
        check_group_size(self.group_size)
        self._check_codes()
        check_known("weight_quantize_type", self.weight_quantize_type, WEIGHT_QUANTIZE_TYPES)
        check_known(
            "activation_quantize_type", self.activation_quantize_type, ACTIVATION_QUANTIZE_TYPES
        )
        check_known("optimize_for", self.optimize_for, OPTIMIZE_FOR)
        check_known("target", self.target, TARGETS)
        self._check_calibrated()
        for name in ("is_full_quantize", "skip_first_last"):
            check_flag(name, getattr(self, name))
        for pattern in self.skip:
            check_pattern("skip", pattern)
        self._check_rules()

    def _take_kinds(self) -> None:
        """PaddleSlim's names become ours; doubles that come of it are dropped, in the order given.

        Raises:
          ValueError: a kind is not known, or there is none.
        """
        valid = MODES[self.mode].kinds
        # Two of PaddleSlim's names may be one kind of ours.
        asked = [
            PADDLE_NAMES.get(kind, kind) if isinstance(kind, str) else kind
            for kind in self.quantizable_op_type
        ]
        for kind in asked:
            check_kind(kind, valid)
        object.__setattr__(self, "quantizable_op_type", tuple(dict.fromkeys(asked)))
        if not self.quantizable_op_type:
            raise ValueError(f"quantizable_op_type is empty; choose from {', '.join(valid)}")

    def _check_calibrated(self) -> None:
        """Raise ValueError where a setting is of calibrated models alone, and this is no such mode.

        It would be passed over silently otherwise.
        """
        if self.mode != STATIC and self.target != ANY:
            raise ValueError(
                f"target={self.target!r} is of jaxquant.quant_post; in mode {self.mode!r} no "
                "tensor is calibrated"
            )
        if self.mode != STATIC and self.activation_quantize_type == "dynamic":
            raise ValueError(
                "activation_quantize_type='dynamic' is of jaxquant.quant_post; in mode "
                f"{self.mode!r} no tensor is calibrated: choose 'asymmetric' or 'symmetric'"
            )

    def _check_codes(self) -> None:
        """Take what a table of four bits implies; raise ValueError where it is asked otherwise."""
        check_known("weight_dtype", self.weight_dtype, (INT, *VALUES))
        if self.weight_dtype == INT:
            return
        if self.mode != WEIGHT_ONLY:
            raise ValueError(
                f"weight_dtype={self.weight_dtype!r} is of jaxquant.quant_weights; where "
                "operations are of int8, weights are too"
            )
        # Codes are of four bits, and the format of MXFP4 says how many share a scale.
        object.__setattr__(self, "weight_bits", 4)
        if self.weight_dtype != MXFP4:
            return
        if self.group_size not in (None, BLOCK):
            raise ValueError(
                f"weight_dtype='mxfp4' has a scale for {BLOCK} weights, got group_size="
                f"{self.group_size}; leave it out"
            )
        object.__setattr__(self, "group_size", BLOCK)

    def _check_rules(self) -> None:
        # One rule in place of a sequence is the likely mistake.
        if isinstance(self.rules, Rule) or not isinstance(self.rules, Sequence):
            raise ValueError(f"rules is a sequence of jaxquant.Rule, got {self.rules!r:.100}")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules holds jaxquant.Rule(pattern, ...), got {rule!r:.100}")
            self._check_in_mode(rule)
        # A sweep folds one state of a user's observer beside the common histogram.
        own = {o for o in map(self.observer_of, self.algos) if not o.keeps_histogram}
        if len(own) > 1:
            raise ValueError(
                "algo and rules name several observers that keep statistics of their own "
                f"({', '.join(map(name_of, self.algos))}); one calibration keeps those of one"
            )

    def _check_in_mode(self, rule: Rule) -> None:
        """Raise ValueError where a rule sets what this mode does not have."""
        if self.mode != WEIGHT_ONLY and (rule.weight_bits or 8) != 8:
            raise ValueError(
                f"rule {rule.pattern!r}: weight_bits={rule.weight_bits} is of "
                "jaxquant.quant_weights; where operations are of int8, weights are too"
            )
        # Without calibration no tensor has a threshold, so these settings would say nothing.
        absent = () if self.mode == STATIC else ("algo", "symmetric", "dynamic")
        for name in (*absent, "recover") if self.mode == DYNAMIC else absent:
            if getattr(rule, name) is not None:
                raise ValueError(
                    f"rule {rule.pattern!r} sets {name}, which is of jaxquant.quant_post: in mode "
                    f"{self.mode!r} no tensor is calibrated"
                )
        self._check_steps(f"rule {rule.pattern!r}: recover", rule.recover or ())

    def _check_steps(self, argument: str, steps: Sequence[str]) -> None:
        """Raise ValueError where a recovery step is not of this mode."""
        for step in steps:
            mode, function = (
                (WEIGHT_ONLY, "quant_weights")
                if step in STEPS_OF_WEIGHTS
                else (STATIC, "quant_post")
            )
            if step == "awq" and self.weight_dtype != INT:
                raise ValueError(
                    f"{argument}: 'awq' is for integers, and weight_dtype={self.weight_dtype!r} "
                    "has none; leave it out"
                )
            if self.mode != mode:
                raise ValueError(
                    f"{argument}: {step!r} is a step of jaxquant.{function}, not of mode "
                    f"{self.mode!r}"
                )


def rule_data(rule: Rule) -> dict[str, Any]:
    """A rule as JSON has it: what it sets alone."""
    data = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return {name: value for name, value in data.items() if value not in (None, "")}


def name_of(algo: str | Observer) -> str:
    """What an algo is called in reports."""
    return algo if isinstance(algo, str) else "custom"
