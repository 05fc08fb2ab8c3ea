"""What each site costs the model's own metric, and which sites matter most."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxquant.progress import Progress
from jaxquant.tune.scores import Scores


class Sensitivity(NamedTuple):
    """Scores of a metric, higher is better.

    Attributes:
      float_score, int8_score: of the float model and of the int8 model.
      alone: site -> the score with this site alone in int8.
      left_float: site -> the score with this site alone in float.
      complete: False where time ran out before all sites were scored.
    """

    float_score: float
    int8_score: float
    alone: Mapping[str, float]
    left_float: Mapping[str, float]
    complete: bool = True

    def effect(self, name: str) -> float:
        """What a site costs: the mean of what it costs alone and of what its float form gains.

        The first is measured with all others in float, the second with all others in int8.
        """
        drop = self.float_score - self.alone[name]
        gain = self.left_float[name] - self.int8_score
        return (drop + gain) / 2

    def ranking(self, quality: Mapping[str, float]) -> list[str]:
        """The sites from the most sensitive on.

        Args:
          quality: site -> SQNR in dB; the least comes first among sites with the same effect, and
            among those that were not scored.
        """
        # A site counts as scored by both views alone.
        scored = [name for name in quality if name in self.alone and name in self.left_float]
        others = [name for name in quality if name not in scored]
        by_effect = sorted(scored, key=lambda name: (-self.effect(name), quality[name]))
        return by_effect + sorted(others, key=lambda name: quality[name])


def measure(
    scores: Scores,
    names: Sequence[str],
    float_score: float | None = None,
    *,
    progress: Progress,
    deadline: float | None = None,
) -> Sensitivity:
    """Score every site in both views.

    Args:
      scores: takes or knows the scores.
      names: all int8 sites.
      float_score: that of the float model; None to take it from the mixture without int8 sites.
      progress: shows how many scores are taken.
      deadline: of `time.monotonic()`, after which no score is taken.
    """
    tasks = [(view, name) for name in names for view in ("alone", "left_float")]
    found: dict[str, dict[str, float]] = {"alone": {}, "left_float": {}}
    complete = True
    with progress.stage("sensitivity", len(tasks), "score") as stage:
        with progress.stage("compiling"):  # the mixtures, with the first scores that are taken
            reached = scores([]) if float_score is None else float_score
            int8_score = scores(names)
        for view, name in stage.each(tasks):
            if deadline is not None and time.monotonic() > deadline:
                complete = False
                break
            # In one view it is the only one, in the other the only one that is not.
            int8 = [name] if view == "alone" else [n for n in names if n != name]
            found[view][name] = scores(int8)
    return Sensitivity(reached, int8_score, found["alone"], found["left_float"], complete)


def curve(
    scores: Scores, names: Sequence[str], ranking: Sequence[str], progress: Progress
) -> list[tuple[int, float]]:
    """(n, score with the n most sensitive sites in float), for n of 0, 1, 2, 4, ... and all."""
    counts = [0]
    while counts[-1] < len(ranking):
        # Doubling: the curve is steep at its beginning, and each score costs.
        counts.append(min(max(2 * counts[-1], 1), len(ranking)))
    with progress.stage("trade-off", len(counts), "score") as stage:
        return [
            (n, scores([x for x in names if x not in set(ranking[:n])])) for n in stage.each(counts)
        ]
