"""The public pipeline: calibrate, plan, quantize."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxquant import stages
from jaxquant.calibration.observations import Observations
from jaxquant.calibration.observers import Observer
from jaxquant.keywords import named
from jaxquant.plan.config import DEFAULT_OP_TYPES, DEFAULT_RECOVERY, QuantConfig, check_flag
from jaxquant.progress import Progress
from jaxquant.recover.steps import check_steps
from jaxquant.run.qapply import QuantizedApply
from jaxquant.tune.goal import MAX_DROP, make_goal
from jaxquant.tune.scores import Metric

Path: TypeAlias = str | os.PathLike[str]


@named
def quant_post(
    params: Any,
    apply_fn: Callable[..., Any],
    ds: Any,
    *,
    algo: str | Observer = "KL",
    hist_percent: float = 0.99999,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    is_full_quantize: bool = False,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "asymmetric",
    recover: Sequence[str] = DEFAULT_RECOVERY,
    recovery_file: str | os.PathLike[str] | None = None,
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    optimize_for: str = "size",
    select: Any = None,
    allow_batch_dependence: bool = False,
    calibration_file: Path | None = None,
    metric: Metric | None = None,
    max_drop: float = MAX_DROP,
    time_budget: float | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Quantize a trained float model to int8 after training.

    Runs the model over `ds` once, chooses a threshold for every tensor that becomes int8, and
    returns an int8 model.  The counterpart of PaddleSlim's `quant_post_static`.

    Args:
      params: pytree of float arrays: linen variables, an nnx state, nested dicts.
      apply_fn: a pure function `apply_fn(params, *inputs)` in inference mode.
      ds: calibration data, 100 to 500 samples: any iterable of what `apply_fn` takes after
        `params` (an array; a tuple of arrays for several arguments; a dict is one argument), or
        a callable that returns a fresh iterator.  An array, or a tuple or dict of arrays, is a
        whole data set with samples along the first axis.  tensorflow-datasets (`tfds.as_numpy`,
        `tfds.data_source`), tf.data and Grain pass as they are.
      algo: how the thresholds are chosen, the largest |x| that each int8 tensor keeps:
        "KL" (the default, see `jaxquant.kl_threshold`) and "KL:paddle-3.3", "KL:paddle-1.6",
        "KL:nvidia", which search like those; "abs_max", also "direct" or "min_max": no clipping;
        "avg": the mean over the samples of their largest |x|; "hist", also "percentile": see
        `hist_percent`; "mse": least squared error; "emd": least change of mean and deviation;
        "ptf": the largest |x| over a power of two, by squared error; "auto": least squared error
        with clipping weighing 16 times; or a `jaxquant.Observer` of one's own.
      hist_percent: the fraction of the values that "hist" keeps.
      batch_size: None where `ds` yields batches; n to stack its samples n at a time.
      batch_nums: how many batches to use; None for all.
      quantizable_op_type: the kinds that become int8, by PaddleSlim's names.
      is_full_quantize: all kinds become int8, so that tensors stay int8 between sites: pooling,
        additions, concatenation, softmax, interpolation, shape operations, ...
      weight_quantize_type: "channel_wise_abs_max" (a scale per output channel) or "abs_max".
      activation_quantize_type: "asymmetric" (a zero point where that makes the steps smaller: all
        256 integers for what is never negative) or "symmetric".
      recover: what repairs the int8 model, () for nothing; always in this order:
        "equalization" gives each input channel of a convolution or dot a step of its own where
        that lessens the error at the outputs, tried on samples (Nagel et al., 2019);
        "smoothquant" does so at dots alone, with its paper's exponent (Xiao et al., 2023);
        "adaround" learns for each weight whether to round down or up (Nagel et al., 2020), with
        optax (the extra "recover"), in seconds to a minute a site; a site where the
        error on held-out samples does not fall keeps nearest rounding;
        "bias_correction" takes away the mean error of each output channel.
        They use up to 64 samples that calibration kept.
      recovery_file: a file (safetensors, sealed as calibration files are) where "adaround" keeps
        the sites that are done, so that a call with the same model, parameters and data goes on
        after an interruption; one of others is refused.  None for nowhere.
      skip: patterns of sites that stay float: globs on site names, parameter paths or scopes
        ("block1/*"), kinds ("kind:softmax"), Flax module classes ("module:SelfAttention").  So
        does everything under `jax.named_scope("skip_quant")`.
      skip_first_last: the first and the last convolution or dot with a weight stay float.
      optimize_for: "size": whatever can becomes int8.  "speed": every convolution and dot is timed
        on this machine in float and in int8, in the shapes of the first batch (so calibrate in the
        batch size that the model will serve), and stays float where int8 takes longer; the report
        says so, with the ratio.  Each different site costs about a second.  The result depends on
        the timing: another call may leave other sites in float.
      select: what of an item of `ds` is given to `apply_fn`: a key or index, a tuple of those, or
        a function of the item; for data sets of (image, label).
      allow_batch_dependence: take a model whose result for a sample depends on the other samples of
        its batch, or that draws a dropout mask from a fixed key.  Without it such a model is
        refused: it is in training mode, as a rule.
      calibration_file: where the observations are saved.  Once it is complete, other calls, with
        any `algo`, take them from there and do not read `ds`; see `jaxquant.calibrate`.
      metric: a function of a model, `metric(model) -> number`, higher for a better model, on
        labelled data of your own; `model(*inputs)` takes what `apply_fn` takes after `params`.
        Given, it is held to within `max_drop` of the float model's: where full int8 falls short,
        the sites that cost most get, in this order, other thresholds, recovery steps, and the float
        type, as few of them as will do.  The report says what was done and what each step gained.
        Where nothing holds the metric, the best model found is returned, with a warning.
      max_drop: by how much the metric may be below the float model's, in the metric's own units.
      time_budget: seconds, after which no other step is begun; None for no limit.
      progress: show what is being done: in a terminal and in a notebook a bar for each stage (with
        tqdm, the extra "progress"), elsewhere lines on stderr; as records of the logger "jaxquant"
        where logging is set up for INFO.  False for nothing.

    Returns:
      `(qparams, qapply)`: a plain nested dict of arrays, and the pure function
      `qapply(qparams, *inputs)`; `qapply.report()` tells what became of every site.

    Raises:
      ValueError: an argument is not valid, `ds` is empty or does not fit `apply_fn`, an activation
        or weight is not finite, a skip pattern matches nothing, nothing is there to quantize, or
        the model is in training mode: a sample's result depends on the others of its batch.
      TypeError: a parameter is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["w"])
      >>> batches = [jax.random.normal(jax.random.key(i), (16, 8)) for i in range(4)]
      >>> qparams, qapply = jaxquant.quant_post(params, apply_fn, batches, progress=False)
      >>> qapply(qparams, batches[0]).shape
      (16, 4)
      >>> qparams["params"]["w"]["int8"].dtype
      dtype('int8')
    """
    config = QuantConfig(
        algo=algo,
        hist_percent=hist_percent,
        quantizable_op_type=quantizable_op_type,
        is_full_quantize=is_full_quantize,
        weight_quantize_type=weight_quantize_type,
        activation_quantize_type=activation_quantize_type,
        recover=recover,
        skip=skip,
        skip_first_last=skip_first_last,
        optimize_for=optimize_for,
    )
    check_steps(config.recover)
    stages.check_files(config, calibration_file, recovery_file)
    check_flag("allow_batch_dependence", allow_batch_dependence)
    goal = make_goal(metric, max_drop, time_budget)
    options = stages.options_of(config, batch_size, batch_nums, select)
    with Progress("quant_post", progress) as shown:
        batches = stages.read(ds, batch_size, batch_nums, select)
        source = stages.float_model(params, apply_fn)
        observations = stages.calibrate(
            source,
            batches,
            config,
            options,
            calibration_file,
            shown,
            allow_batch_dependence,
        )
        return stages.quantize(source, observations, config, recovery_file, shown, goal)


@named
def calibrate(
    params: Any,
    apply_fn: Callable[..., Any],
    ds: Any,
    *,
    observer: str | Observer = "KL",
    batch_size: int | None = None,
    batch_nums: int | None = None,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    is_full_quantize: bool = False,
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    select: Any = None,
    allow_batch_dependence: bool = False,
    calibration_file: Path | None = None,
    progress: bool = True,
) -> Observations:
    """Run the float model over `ds` once and observe every tensor that may become int8.

    The first step of `jaxquant.quant_post`, whose arguments the others are.

    Args:
      params, apply_fn, ds: the model and its data.
      observer: the `algo` that is to come, where it keeps statistics beside the common ones: "avg"
        or an observer of one's own.

    With `calibration_file` the state is saved as the sweep goes: after the first batch, then at
    most every 30 seconds, and where an error or Ctrl-C ends it.  The next call with that file goes
    on from there, with a result that is the same bit for bit: it reads the batches again that have
    been seen, without running the model, and refuses a `ds` that gives others, as one that shuffles
    anew does, or a generator that was read in part (pass a callable that makes it).  Once the file
    is complete `ds` is not read at all; nor is it compared, so name another file for other data.
    The file holds up to 64 samples of the data, beside the statistics.

    Returns:
      The observations, from which `jaxquant.quantize` makes the int8 model, with any `algo`.  They
      do not grow with the number of samples.

    Raises:
      ValueError: `ds` is empty, a batch does not fit `apply_fn`, the model has no site, or an
        activation is NaN or infinite (the message names the site and the batch); the calibration
        file is damaged, or of another model, other parameters or options (the message says which).

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> observations = jaxquant.calibrate(
      ...     {"w": jnp.eye(4)}, lambda p, x: x @ p["w"], [jnp.ones((2, 4))], progress=False)
      >>> observations.tensors["w/input"].abs_max
      1.0
    """
    config = QuantConfig(
        algo=observer,
        quantizable_op_type=quantizable_op_type,
        is_full_quantize=is_full_quantize,
        skip=skip,
        skip_first_last=skip_first_last,
    )
    stages.check_files(config, calibration_file, None)
    check_flag("allow_batch_dependence", allow_batch_dependence)
    options = stages.options_of(config, batch_size, batch_nums, select)
    with Progress("calibrate", progress) as shown:
        batches = stages.read(ds, batch_size, batch_nums, select)
        source = stages.float_model(params, apply_fn)
        return stages.calibrate(
            source,
            batches,
            config,
            options,
            calibration_file,
            shown,
            allow_batch_dependence,
        )


@named
def quantize(
    params: Any,
    apply_fn: Callable[..., Any],
    observations: Observations | Path,
    *,
    algo: str | Observer = "KL",
    hist_percent: float = 0.99999,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    is_full_quantize: bool = False,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "asymmetric",
    recover: Sequence[str] = DEFAULT_RECOVERY,
    recovery_file: str | os.PathLike[str] | None = None,
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    optimize_for: str = "size",
    progress: bool = True,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Make the int8 model from what `jaxquant.calibrate` observed.

    The second step of `jaxquant.quant_post`, whose arguments the others are.

    Args:
      params: the parameters that were calibrated.
      apply_fn: the function that was calibrated.
      observations: what `jaxquant.calibrate` returned, or the path of a calibration file, which
        must be of this model and these parameters.  They serve any `algo`, but "avg" and observers
        of one's own only where they were made with it.

    Returns:
      `(qparams, qapply)`, as `jaxquant.quant_post`.

    Raises:
      ValueError: an option is not valid, a skip pattern matches nothing, no site is left, or the
        observations are of another function or other parameters or lack a tensor that these
        options need, or the calibration file is refused.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> observations = jaxquant.calibrate(params, apply_fn, [jnp.ones((2, 4))], progress=False)
      >>> qparams, qapply = jaxquant.quantize(params, apply_fn, observations, algo="abs_max")
      >>> qapply(qparams, jnp.ones((1, 4))).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    config = QuantConfig(
        algo=algo,
        hist_percent=hist_percent,
        quantizable_op_type=quantizable_op_type,
        is_full_quantize=is_full_quantize,
        weight_quantize_type=weight_quantize_type,
        activation_quantize_type=activation_quantize_type,
        recover=recover,
        skip=skip,
        skip_first_last=skip_first_last,
        optimize_for=optimize_for,
    )
    stages.check_files(config, None, recovery_file)
    if not isinstance(observations, Observations | str | os.PathLike):
        raise TypeError(
            "observations is what jaxquant.calibrate returned, or the path of a calibration file; "
            f"got {type(observations).__name__}"
        )
    with Progress("quantize", progress) as shown:
        source = stages.float_model(params, apply_fn)
        if not isinstance(observations, Observations):
            observations = stages.load(observations, source, config, shown)
        else:
            stages.check_given(observations, source, config, shown)
        return stages.quantize(source, observations, config, recovery_file, shown)
