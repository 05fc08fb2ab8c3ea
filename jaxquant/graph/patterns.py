"""Patterns on sites: globs on their names, and behind them layers of scans, "layers/mlp[3]"."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.graph.sites import Site

# Layers at the end of a pattern: numbers and slices as of an axis, "[3]", "[-1]", "[:4]", "[1][2]".
_NUMBER = r"-?(?:0|[1-9]\d*)"
_LAYERS = re.compile(rf"(.+?)((?:\[(?:{_NUMBER}|(?:{_NUMBER})?:(?:{_NUMBER})?)\])+)")


class Layered(NamedTuple):
    """A pattern that ends in layers.

    Attributes:
      base: the pattern before them.
      layers: what is in each pair of brackets, for the outermost scan first.
    """

    base: str
    layers: tuple[str, ...]

    def holds(self, layer: Sequence[int], scans: Sequence[int]) -> bool:
        """Whether it is of a layer of these scans; it may leave out inner ones."""
        # What is left out are inner scans: all of their layers.
        parts = zip(self.layers, layer, scans, strict=False)
        return all(number in _numbers(text, length) for text, number, length in parts)

    def is_empty(self, scans: Sequence[int]) -> bool:
        """Whether these scans have no such layer."""
        parts = zip(self.layers, scans, strict=False)
        return not all(_numbers(text, length) for text, length in parts)


def _numbers(text: str, length: int) -> range:
    """The layers of a scan that "3", "-1" or "0:4" stands for."""
    start, colon, stop = text.partition(":")
    if colon:
        bounds = slice(int(start) if start else None, int(stop) if stop else None)
        return range(length)[bounds]
    number = int(text) + (length if text.startswith("-") else 0)
    return range(number, number + 1) if 0 <= number < length else range(0)


def layered(pattern: str) -> Layered | None:
    """The layers that a pattern ends in; None where it ends in none.

    Example:
      >>> layered("layers/*[3]"), layered("block[ab]")
      (Layered(base='layers/*', layers=('3',)), None)
    """
    match = _LAYERS.fullmatch(pattern)
    # "[3][1:4]" has one pair of brackets for each scan.
    return None if match is None else Layered(match[1], tuple(match[2][1:-1].split("][")))


def matches(site: Site, pattern: str) -> bool:
    """Whether a pattern is of a site, or of some of its layers.

    A glob on the site's name, scope or parameter path, or on its kind or module classes.  The last
    two are written "kind:softmax" and "module:SelfAttention"; "site:b1/Conv_0" is the site of
    exactly that name.  Of a site inside scans over stacked weights layers may follow,
    "layers/mlp[3]"; brackets are read as layers where what is before them matches the site.
    """
    found = _layers_of(site, pattern)
    return matches_site(site, pattern) if found is None else not found.is_empty(site.scans)


def matches_layer(site: Site, pattern: str, layer: Sequence[int]) -> bool:
    """Whether a pattern is of one layer of a site.

    Args:
      site: the site; it need not be inside a scan.
      pattern: see `matches`.
      layer: its numbers in the scans around the site, outermost first.
    """
    found = _layers_of(site, pattern)
    return matches_site(site, pattern) if found is None else found.holds(layer, site.scans)


def takes_some_layers(site: Site, pattern: str) -> bool:
    """Whether a pattern is of some of a site's layers and not of others."""
    found = _layers_of(site, pattern)
    if found is None or found.is_empty(site.scans):
        return False
    return not all(found.holds(layer, site.scans) for layer in np.ndindex(site.scans))


def _layers_of(site: Site, pattern: str) -> Layered | None:
    """The layers of a site that a pattern names; None where it names none.

    A name may end in brackets of its own, as that of a site in a scan that is cut.
    """
    found = layered(pattern)
    if found is None:
        return None
    # Brackets at the end may belong to the name itself, so that each number of them is tried.
    for count in range(len(found.layers)):
        base = found.base + "".join(f"[{text}]" for text in found.layers[:count])
        layers = found.layers[count:]
        if len(layers) <= len(site.scans) and matches_site(site, base):
            return Layered(base, layers)
    return None


def matches_site(site: Site, pattern: str) -> bool:
    """Whether a pattern is of a site, brackets being read as a glob's always."""
    # "site:" is a name as it is, since names may hold what a glob reads as a pattern.
    prefix, _, rest = pattern.partition(":")
    if prefix == "site" and rest:
        return site.name == rest
    if prefix == "kind" and rest:
        return fnmatch.fnmatchcase(site.kind, rest)
    if prefix == "module" and rest:
        return any(fnmatch.fnmatchcase(module, rest) for module in site.modules)
    # A pattern may name any of the three; most sites have but one or two.
    return any(
        fnmatch.fnmatchcase(text, pattern)
        for text in (site.name, site.scope, site.weight_path)
        if text
    )


def lacking_layers(found: Sequence[Site], pattern: str) -> str:
    """Why a pattern that matches no site has no such layer; "" where that is not the reason."""
    asked = layered(pattern)
    named = [] if asked is None else [site for site in found if matches_site(site, asked.base)]
    if asked is None or not named:
        return ""
    # The site that comes nearest to what was asked for tells most.
    site = max(named, key=lambda site: (len(site.scans), bool(site.inside)))
    if len(site.scans) >= len(asked.layers):
        sizes = " and ".join(map(str, site.scans))
        return f"; {site.name!r} has {sizes} layers, numbered from 0"
    if site.scans:
        return f"; {site.name!r} is inside {len(site.scans)} scans over stacked weights"
    if site.inside:
        return (
            f"; {site.name!r} is inside {'/'.join(site.inside)} over weights that all steps share, "
            "which have one plan: what is set is set for all steps"
        )
    return f"; {site.name!r} is inside no scan over stacked weights, so it has no layers"
