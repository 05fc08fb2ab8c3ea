"""Reads Keras weights, from TensorFlow.js folders and from HDF5, as "layer/weight" names."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.weights import limits
from experiments.weights.tree import CutShortError, WeightsError, shortened
from jaxquant.extras import how_to_install

# `.weights.h5` of Keras 3 numbers the arrays of a layer; the count tells what they are.
LAYER_WEIGHTS = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}

# What Keras 1 calls them behind the name of the layer, a number perhaps following.
KERAS_1 = re.compile(r"(W|b)(?:_\d+)?")
KERAS_1_WEIGHTS = {"W": "kernel", "b": "bias"}


def read_tfjs(path: str | Path) -> dict[str, np.ndarray]:
    """The weights of a TensorFlow.js `model.json` and the binary files beside it.

    Weights that were stored with fewer bits are brought back to float32.

    Raises:
      WeightsError: the manifest is not one, or a binary file is missing or short; names the
        weights concerned.
    """
    path = Path(path)
    with limits.refusing(path, "not a TensorFlow.js model with a weightsManifest"):
        manifest = limits.parse_json(limits.read_bytes(path))["weightsManifest"]
        arrays: dict[str, np.ndarray] = {}
        missing: list[str] = []
        room = limits.MAX_BYTES
        for group in manifest:
            contents = b"".join(_read_shard(path.parent, name) for name in group["paths"])
            room -= len(contents)
            if room < 0:
                raise WeightsError(f"its binary files have more than {limits.MAX_BYTES} bytes")
            position = 0
            for weight in group["weights"]:
                dtype, shape = _stored(path, weight)
                size = math.prod(shape)
                end = position + dtype.itemsize * size
                if end > len(contents):
                    missing.append(weight["name"])
                else:
                    flat = np.frombuffer(contents, dtype, size, position)
                    arrays[weight["name"]] = _restored(flat, weight).reshape(shape)
                position = end
    if missing:
        raise WeightsError(
            f"{path}: binary files are missing or cut short; without {len(missing)} weights:\n  "
            + "\n  ".join(shortened(missing))
        )
    return arrays


def read_h5(path: str | Path) -> dict[str, np.ndarray]:
    """The weights of a Keras `.h5` or `.weights.h5`, which needs h5py.

    Raises:
      WeightsError: h5py is not installed, the file is not HDF5 or is cut short, or its layers have
        no names.
    """
    try:
        import h5py
    except ImportError as error:
        raise WeightsError(f"{path}: reading HDF5 needs h5py: {how_to_install('hdf5')}") from error
    try:
        with (
            limits.refusing(Path(path), "not an HDF5 file, or damaged"),
            h5py.File(path, "r") as file,
        ):
            root = file.get("model_weights", file)
            datasets: dict[str, Any] = {}
            root.visititems(
                lambda name, item: (
                    datasets.update({name: item}) if isinstance(item, h5py.Dataset) else None
                )
            )
            _check_datasets(datasets)
            if "layers" in root and "layer_names" not in root.attrs:
                return _keras3(Path(path), datasets)
            return {_legacy_name(name): np.asarray(item) for name, item in datasets.items()}
    except WeightsError as error:
        if "truncated" in str(error):  # HDF5 then reads nothing of it
            raise CutShortError(f"{path}: cut short: {error}", {}) from error
        raise


def _check_datasets(datasets: Mapping[str, Any]) -> None:
    """Raise WeightsError where arrays are too large, or are kept in other files.

    What HDF5 fills in or unpacks takes no room in the file.
    """
    outside = [name for name, item in datasets.items() if item.external or item.is_virtual]
    if outside:
        raise WeightsError(f"arrays of other files: {shortened(outside)}")
    if sum(item.size * item.dtype.itemsize for item in datasets.values()) > limits.MAX_BYTES:
        raise WeightsError(f"its arrays take more than {limits.MAX_BYTES} bytes")


def _legacy_name(name: str) -> str:
    """From "conv1/model/conv1/kernel:0" or "conv1/conv1_W_1:0" to "conv1/kernel".

    Both start with the layer; the second form is Keras 1's, in which the published weights of VGG
    still come.
    """
    layer, *_, weight = name.split("/")
    weight = weight.partition(":")[0]
    found = KERAS_1.fullmatch(weight.removeprefix(f"{layer}_"))
    return f"{layer}/{KERAS_1_WEIGHTS[found[1]] if found else weight}"


def _keras3(path: Path, datasets: dict[str, Any]) -> dict[str, np.ndarray]:
    """Names are an attribute of the group "layers/conv2d_1/vars"; the arrays are 0, 1, …."""
    arrays = {}
    for name, item in datasets.items():
        group = item.parent
        if not group.name.endswith("/vars") or not name.startswith("layers/"):
            continue
        layer, weights = group.attrs.get("name"), LAYER_WEIGHTS.get(len(group))
        if layer is None or weights is None:
            raise WeightsError(
                f"{path}: {group.name} has {len(group)} arrays and the layer name {layer!r}; save "
                "the model with a newer Keras 3, which keeps the names, or as .h5"
            )
        arrays[f"{layer}/{weights[int(name.rsplit('/', 1)[1])]}"] = np.asarray(item)
    return arrays


def _read_shard(folder: Path, name: str) -> bytes:
    if Path(name).name != name:
        raise WeightsError(f"{folder}: the manifest's path {name!r} leads out of its folder")
    path = folder / name
    return limits.read_bytes(path) if path.is_file() else b""


def _stored(path: Path, weight: dict[str, Any]) -> tuple[np.dtype, tuple[int, ...]]:
    """Element type and shape of a weight in the binary file."""
    name = weight.get("quantization", weight)["dtype"]
    if name not in ("float32", "float16", "uint8", "uint16", "int32", "bool"):
        raise WeightsError(f"{path}: {weight['name']} has the dtype {name!r}, which is not known")
    dtype = np.dtype(name).newbyteorder("<")
    return dtype, limits.checked_shape(weight["shape"], np.dtype(np.float64))


def _restored(flat: np.ndarray, weight: dict[str, Any]) -> np.ndarray:
    quantization = weight.get("quantization", {})
    if "scale" not in quantization:
        return flat.astype(weight["dtype"])
    scaled = flat.astype(np.float64) * quantization["scale"] + quantization["min"]
    return scaled.astype(weight["dtype"])
