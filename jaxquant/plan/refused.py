"""A configuration that does not fit the sites of a model."""

from __future__ import annotations

from jaxquant.graph.sites import Site
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.rules import check_rules, check_skip


def check_patterns(found: tuple[Site, ...], config: QuantConfig) -> None:
    check_skip(found, config.skip)
    check_rules(found, config.rules, config.kinds)


def nothing_left(reasons: set[str]) -> ValueError:
    first = sorted(reasons)[:5]
    others = f"; and {len(reasons) - len(first)} more" if len(reasons) > len(first) else ""
    return ValueError(f"no site is left to quantize ({'; '.join(first)}{others})")
