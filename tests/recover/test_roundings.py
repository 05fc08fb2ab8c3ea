"""The file of learned roundings: sealed, and of one model, its parameters and its samples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.files import safetensors
from jaxquant.files.errors import FileError
from jaxquant.graph.trace import trace
from jaxquant.recover.roundings import FORM, Origin, Rounding, Roundings, digest, make_source
from tests.mutations import MUTATIONS

SOURCE = Origin("model", {"w": "float32[5,3] 0"}, "data", "0.10")
KNOWN, OTHER = digest(np.zeros(3)), digest(np.zeros(4))
UP = np.random.default_rng(0).random((1, 5, 3)) > 0.5


def opened(path: Path | None, source: Origin = SOURCE) -> Roundings:
    return Roundings(path, lambda: source)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two sites."""
    found = tmp_path / "roundings.safetensors"
    opened(found).put("file", KNOWN, Rounding(UP, 2.0, 1.0))
    opened(found).put("b/c~", KNOWN, Rounding(~UP, 3.0, 4.0))
    return found


def contents(roundings: Roundings) -> list[Any]:
    found = [roundings.get(name, KNOWN, UP.shape) for name in ("file", "b/c~")]
    return [None if each is None else (each.up.tolist(), each[1:]) for each in found]


def test_what_was_put_is_there(path: Path):
    assert contents(opened(path)) == [(UP.tolist(), (2.0, 1.0)), ((~UP).tolist(), (3.0, 4.0))]
    assert opened(path).get("b/c~", OTHER, UP.shape) is None
    assert opened(path).get("c", KNOWN, UP.shape) is None


def test_without_a_path_nothing_is_kept(tmp_path: Path):
    roundings = Roundings(None, lambda: pytest.fail("what it is of is not needed"))
    roundings.put("a", KNOWN, Rounding(UP, 2.0, 1.0))
    assert roundings.get("a", KNOWN, UP.shape) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Origin("m", SOURCE.params, "data", "0.10"), "apply_fn computes something else"),
        (Origin("m", SOURCE.params, "data", "9"), "or jax 0.10, which it was made with"),
        (Origin("model", {"w": "x"}, "data", "0.10"), "the parameters 'w' differ"),
        (Origin("model", dict.fromkeys("wabc", ""), "data", "0.10"),
         "the parameters 'w', 'a', 'b' and 1 more differ"),
        (Origin("model", SOURCE.params, "d", "0.10"), "the calibration samples differ"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(path: Path, other: Origin, message: str):
    before = path.read_bytes()
    with pytest.raises(FileError, match=f"roundings.safetensors' is of another.*{message}"):
        opened(path, other)
    assert path.read_bytes() == before


def test_a_source_tells_models_parameters_and_samples_apart():
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)

    def source(function: Any, scale: float, x: np.ndarray) -> Origin:
        params = {"w": jnp.eye(4) * scale}
        return make_source(trace(function, params, (x,)), params, [(x,)])

    def plain(p: Any, x: Any) -> Any:
        return x @ p["w"]

    first = source(plain, 1.0, x)
    assert not first.differences(source(plain, 1.0, x.copy()))
    for other in (
        source(lambda p, x: -x @ p["w"], 1.0, x),
        source(plain, 2.0, x),
        source(plain, 1.0, x[::-1].copy()),
    ):
        assert len(first.differences(other)) == 1


@pytest.mark.parametrize("content", [b"", b"not a file of arrays", b"PK\x03\x04cut short"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"recovery_file='.*other' is damaged, or is none"):
        opened(path)
    np.savez(path.with_name("old.npz"), **{"site:a": np.zeros(3, np.uint8)})
    with pytest.raises(FileError, match=r"old.npz' is damaged, or is none of this release"):
        opened(path.with_name("old.npz"))
    with pytest.raises(ValueError, match="not a plain file"):
        opened(tmp_path)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_hold_the_same(path: Path, tmp_path: Path, count: int):
    draw, mutated, saved = random.Random(1), tmp_path / "mutated", path.read_bytes()
    want, same = contents(opened(path)), 0
    for number in range(count):
        raw = bytearray(saved)
        MUTATIONS[number % len(MUTATIONS)](raw, draw)
        mutated.write_bytes(raw)
        try:
            found = contents(opened(mutated))
        except FileError as error:
            if str(mutated) not in str(error):
                raise
            continue
        assert found == want
        same += 1
    assert same < count / 10


@pytest.mark.parametrize("change", ["short", "long", "bits", "names", "sites", "source", "dtype"])
def test_a_file_with_the_right_seal_is_checked_all_the_same(path: Path, change: str):
    tensors, metadata, _ = safetensors.read(path, FORM)
    text = json.loads(metadata["roundings"])
    if change == "short":
        tensors["up/0"] = tensors["up/0"][:1]
    elif change == "long":
        tensors["up/0"] = np.append(tensors["up/0"], np.uint8(0))
    elif change == "bits":
        tensors["up/0"] = tensors["up/0"] | np.uint8(1)  # of 15 weights: the last bit is none
    elif change == "names":
        text["sites"] = ["file", "file"]
    elif change == "sites":
        text["sites"] += ["c"]
    elif change == "source":
        text["source"]["params"] = {"w": 1}
    else:
        tensors["errors"] = tensors["errors"].astype(np.float32)
    metadata = {"roundings": json.dumps(text)}
    path.write_bytes(b"".join(map(bytes, safetensors.chunks(tensors, metadata, FORM))))
    with pytest.raises(FileError, match="recovery_file="):
        contents(opened(path))
