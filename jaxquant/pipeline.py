"""The public pipeline: calibrate, plan, quantize."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias, Unpack

from jaxquant import stages
from jaxquant.calibration.observations import Observations
from jaxquant.calibration.padding import Mask, Padding
from jaxquant.keywords import named
from jaxquant.plan.checks import check_flag
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.settings import Settings, config_of, spelled_out
from jaxquant.progress import Progress
from jaxquant.recover.steps import check_steps
from jaxquant.run.qapply import QuantizedApply
from jaxquant.tune.goal import MAX_DROP, make_goal
from jaxquant.tune.scores import Metric

Path: TypeAlias = str | os.PathLike[str]


@named
@spelled_out
def quant_post(
    params: Any,
    apply_fn: Callable[..., Any],
    ds: Any,
    *,
    config: QuantConfig | None = None,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    select: Any = None,
    mask: Mask = None,
    allow_batch_dependence: bool = False,
    calibration_file: Path | None = None,
    recovery_file: Path | None = None,
    metric: Metric | None = None,
    max_drop: float = MAX_DROP,
    time_budget: float | None = None,
    progress: bool = True,
    **settings: Unpack[Settings],
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
        `tfds.data_source`), tf.data and Grain pass as they are.  Batches may have several shapes,
        as prompts and single tokens of a decoder or texts of several lengths: the model is compiled
        for each, what they show counts together, and `qapply` takes them all.
      config: how the model is quantized, a `jaxquant.QuantConfig`; or its fields as keywords:
        `algo`, `hist_percent`, `quantizable_op_type`, `is_full_quantize`, `weight_quantize_type`,
        `activation_quantize_type`, `recover`, `skip`, `skip_first_last`, `optimize_for` and
        `rules`, settings for some of the sites.
      batch_size: None where `ds` yields batches; n to stack its samples n at a time.
      batch_nums: how many batches to use; None for all.
      select: what of an item of `ds` is given to `apply_fn`: a key or index, a tuple of those, or
        a function of the item; for data sets of (image, label).
      mask: which positions of padded texts count: the key of the input (in a dict) or its index
        that holds 1 where a position [B, T] is no padding and 0 elsewhere, or a function of the
        inputs that gives that, `mask=lambda ids: ids != 0`.  Padding is then counted nowhere where
        it can be followed through the model, and a warning names what it cannot be followed to;
        not by "adaround" either, which learns on all positions.  The axes of samples and positions
        are found from the inputs that begin with the mask's sizes; where those are of another
        sequence too, a dict by the inputs names the mask of each.
      allow_batch_dependence: take a model whose result for a sample depends on the other samples of
        its batch, or that draws a dropout mask from a fixed key.  Without it such a model is
        refused: it is in training mode, as a rule.
      calibration_file: where the observations are saved.  Once it is complete, other calls, with
        any `algo`, take them from there and do not read `ds`; see `jaxquant.calibrate`.
      recovery_file: a file (safetensors, sealed as calibration files are) where "adaround" keeps
        the sites that are done, so that a call with the same model, parameters and data goes on
        after an interruption; one of others is refused.  None for nowhere.
      metric: a function of a model, `metric(model) -> number`, higher for a better model, on
        labelled data of your own; `model(*inputs)` takes what `apply_fn` takes after `params`.
        Given, it is held to within `max_drop` of the float model's: where full int8 falls short,
        the sites that cost most get, in this order, other thresholds, recovery steps, and the float
        type, as few of them as will do.  The report says what was done and what each step gained;
        its `rules` are those that were found, to be passed back as `rules`.
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
        or weight is not finite, a skip pattern or rule matches nothing, nothing is there to
        quantize, or the model is in training mode: a sample's result depends on the others of its
        batch.
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
    config = config_of(config, settings)
    # What can be refused is refused before the data are read, which may take minutes.
    check_steps(config.all_steps)
    stages.check_files(config, calibration_file, recovery_file)
    check_flag("allow_batch_dependence", allow_batch_dependence)
    goal = make_goal(metric, max_drop, time_budget)
    padding = Padding.of(mask)
    options = stages.options_of(config, batch_size, batch_nums, select, padding)
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
            padding,
        )
        return stages.quantize(source, observations, config, recovery_file, shown, goal)


@named
@spelled_out
def calibrate(
    params: Any,
    apply_fn: Callable[..., Any],
    ds: Any,
    *,
    config: QuantConfig | None = None,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    select: Any = None,
    mask: Mask = None,
    allow_batch_dependence: bool = False,
    calibration_file: Path | None = None,
    progress: bool = True,
    **settings: Unpack[Settings],
) -> Observations:
    """Run the float model over `ds` once and observe every tensor that may become int8.

    The first step of `jaxquant.quant_post`, whose arguments the others are.

    Args:
      params, apply_fn, ds: the model and its data.
      config, settings: those that are to come, or as many of them as what is observed depends on:
        `quantizable_op_type`, `is_full_quantize`, and an `algo`, also of a rule, that keeps
        statistics beside the common ones: "avg" or an observer of one's own.

    With `calibration_file` the state is saved as the sweep goes: after the first batch, then at
    most every 30 seconds, and where an error or Ctrl-C ends it.  The next call with that file goes
    on from there, with a result that is the same bit for bit: it reads the batches again that have
    been seen, without running the model, and refuses a `ds` that gives others, as one that shuffles
    anew does, or a generator that was read in part (pass a callable that makes it).  Once the file
    is complete `ds` is not read at all; nor is it compared, so name another file for other data.
    The file holds up to 64 samples of the data, and the first batch of each of up to four shapes,
    beside the statistics.

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
    config = config_of(config, settings)
    stages.check_files(config, calibration_file, None)
    check_flag("allow_batch_dependence", allow_batch_dependence)
    padding = Padding.of(mask)
    options = stages.options_of(config, batch_size, batch_nums, select, padding)
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
            padding,
        )


@named
@spelled_out
def quantize(
    params: Any,
    apply_fn: Callable[..., Any],
    observations: Observations | Path,
    *,
    config: QuantConfig | None = None,
    recovery_file: Path | None = None,
    progress: bool = True,
    **settings: Unpack[Settings],
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
      ValueError: an option is not valid, a skip pattern or rule matches nothing, no site is left,
        or the observations are of another function or other parameters or lack a tensor that these
        options need, or the calibration file is refused.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> observations = jaxquant.calibrate(params, apply_fn, [jnp.ones((2, 4))], progress=False)
      >>> qparams, qapply = jaxquant.quantize(params, apply_fn, observations, algo="abs_max")
      >>> qapply(qparams, jnp.ones((1, 4))).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    config = config_of(config, settings)
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
