"""The command line: inspect, compare and convert saved models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxquant._version import __version__
from jaxquant.deploy import tree
from jaxquant.deploy.differences import differences
from jaxquant.deploy.litert.export import export_litert
from jaxquant.deploy.onnx.export import OPSETS, export_onnx
from jaxquant.deploy.onnx.target import PROCESSORS, RUNTIMES
from jaxquant.deploy.program import PLATFORMS
from jaxquant.deploy.saved import FORMAT, load_quantized_model
from jaxquant.deploy.stablehlo import export_stablehlo
from jaxquant.files import safetensors as container
from jaxquant.run.qapply import QuantizedApply

SAME, DIFFERENT, FAILED = 0, 1, 2
_EXIT_CODES = "exit status: 0 done, 2 a file is refused or cannot be read or written"
_SUFFIXES = {"litert": ".tflite", "onnx": ".onnx", "stablehlo": ".jaxexport"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.action(options))
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxquant {options.command}: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxquant",
        description="Look into int8 models that jaxquant.save_quantized_model wrote, compare them "
        "and convert them. The model's own code is not needed.",
        epilog="examples:\n"
        "  python -m jaxquant inspect model.safetensors\n"
        "  python -m jaxquant inspect model.safetensors --json | jq .summary\n"
        "  python -m jaxquant compare old.safetensors new.safetensors\n"
        "  python -m jaxquant convert model.safetensors model.tflite\n"
        "  python -m jaxquant convert model.safetensors model.onnx --channels-first\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_compare(commands)
    _add_convert(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "what is in a saved model: its inputs, sites, scales, bytes and versions",
        _EXIT_CODES,
    )
    inspect.add_argument("path", metavar="PATH", help="a saved model")
    inspect.add_argument("--json", action="store_true", help="print JSON, with every array listed")


def _add_compare(commands: Any) -> None:
    compare = _command(
        commands,
        "compare",
        _compare,
        "what differs between two saved models: sites, grids, arrays",
        "exit status: 0 the arrays and the plans are the same, 1 they differ, 2 a file is refused",
    )
    compare.add_argument("a", metavar="A", help="a saved model")
    compare.add_argument("b", metavar="B", help="another one")
    compare.add_argument("--json", action="store_true", help="print JSON")


def _add_convert(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        _convert,
        "write a saved model for LiteRT (.tflite), as ONNX (QDQ form) or as StableHLO",
        _EXIT_CODES,
    )
    convert.add_argument("path", metavar="PATH", help="a saved model")
    convert.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        help="the file to write; default: PATH with the suffix of the format",
    )
    convert.add_argument(
        "--to",
        choices=sorted(_SUFFIXES),
        help=f"the format; default: by the suffix of OUTPUT, {', '.join(_SUFFIXES.values())}",
    )
    convert.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help="the sizes of each input, with names for those that vary: 'b, 224, 224, 3', or "
        "'1, 224, 224, 3' for one image at a time; default: as the model was saved",
    )
    convert.add_argument(
        "--constraints",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="what holds for the sizes with names: 's <= 512'",
    )

    # They have no default: what is given is told from what is not, and refused of another format.
    _add_format_options(convert)
    convert.add_argument("--json", action="store_true", help="print JSON")


def _add_format_options(convert: Any) -> None:
    """What one format alone knows; another one refuses it."""
    convert.add_argument(
        "--opset",
        type=int,
        help=f"ONNX: version of the operators, {OPSETS[0]} to {OPSETS[-1]}; default: the oldest "
        "that has the model's",
    )
    convert.add_argument(
        "--channels-first",
        action="store_true",
        help="ONNX: images as [B, C, H, W], as most runtimes want them",
    )
    convert.add_argument(
        "--channels-last",
        action="store_true",
        help="LiteRT: images as [B, H, W, C] where the model has [B, C, H, W]",
    )
    convert.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help=f"ONNX: the form that one runtime runs best (default: {RUNTIMES[0]}, QDQ throughout)",
    )
    convert.add_argument(
        "--processors",
        choices=PROCESSORS,
        help="ONNX: which ones will run it; all but 'any' give int8 weights, faster, and wrong on "
        f"x86 without VNNI (default: {PROCESSORS[0]}, exact on all)",
    )
    convert.add_argument(
        "--platforms",
        nargs="+",
        choices=PLATFORMS,
        help="StableHLO: those whose form the file has (default: all)",
    )


def _command(commands: Any, name: str, action: Any, text: str, epilog: str) -> Any:
    parser = commands.add_parser(name, help=text, description=f"Tell or do: {text}.", epilog=epilog)
    parser.set_defaults(action=action)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    _check_given(options.path)
    # Read by its digest, so that what is shown and what is loaded is one file.
    _, metadata, digest = container.read(options.path, FORMAT)
    qparams, qapply = load_quantized_model(options.path, sha256=digest)
    found = inspection(options.path, digest, metadata, qparams, qapply)
    if options.json:
        print(json.dumps(found, indent=1))
        return SAME
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(
        f"{options.path}: {found['bytes']:,} bytes, format {found['format_version']}, made with "
        f"{versions}\nsha256 {digest}\n\ninputs   {', '.join(found['inputs'])}\nrecover  "
        f"{', '.join(qapply.plan.recover) or 'nothing'}\n\n{qapply.report()}"
    )
    return SAME


def inspection(
    path: str,
    digest: str,
    metadata: Mapping[str, str],
    qparams: Mapping[str, Any],
    qapply: QuantizedApply,
) -> dict[str, Any]:
    """A saved model as plain data."""
    arrays = tree.flatten(qparams)
    report = json.loads(qapply.report().to_json())
    return {
        "path": path,
        "bytes": os.path.getsize(path),
        "sha256": digest,
        "format_version": FORMAT.version,
        "versions": {name: metadata[name] for name in ("jaxquant", "jax") if name in metadata},
        "inputs": list(qapply.input_shapes),
        "summary": report["summary"],
        "sites": report["rows"],
        "tensors": [dataclasses.asdict(tensor) for tensor in qapply.plan.tensors],
        "arrays": [
            {"name": k, "dtype": str(v.dtype), "shape": list(v.shape), "bytes": v.nbytes}
            for k, v in arrays.items()
        ],
    }


def _compare(options: argparse.Namespace) -> int:
    for path in (options.a, options.b):
        _check_given(path)
    found = differences(load_quantized_model(options.a), load_quantized_model(options.b))
    same = not any(found.values())
    if options.json:
        print(json.dumps({"same": same, **found}, indent=1))
    elif same:
        print("the same plan and the same arrays")
    else:
        for part, entries in found.items():
            print(f"{part}: {len(entries)} differ")

            # The first of them only: a model of other shapes differs in all its arrays.
            for name, text in list(entries.items())[:20]:
                print(f"  {name}: {text}")
            if len(entries) > 20:
                print(f"  and {len(entries) - 20} more, see --json")
    return SAME if same else DIFFERENT


def _convert(options: argparse.Namespace) -> int:
    _check_order(options)
    _check_given(options.path)
    to = _format(options)
    output = options.output or os.path.splitext(options.path)[0] + _SUFFIXES[to]

    # Written over, the one copy of the model would be gone.
    if os.path.abspath(output) == os.path.abspath(options.path):
        raise ValueError(f"{output} is the model itself; give another OUTPUT")
    own = _own_settings(options, to)
    qparams, qapply = load_quantized_model(options.path)
    # One text is for all inputs, several are for one each.
    shapes = tuple(options.shapes) if len(options.shapes) > 1 else next(iter(options.shapes), None)
    settings: dict[str, Any] = {"shapes": shapes, "constraints": options.constraints}
    settings["progress"] = False  # a command says nothing beside its result
    _EXPORTS[to](output, qparams, qapply, **settings, **own)
    size = os.path.getsize(output)
    if options.json:
        print(json.dumps({"output": output, "format": to, "bytes": size}))
    else:
        print(f"{output}: {size:,} bytes")
    return SAME


_EXPORTS: dict[str, Callable[..., None]] = {
    "litert": export_litert,
    "onnx": export_onnx,
    "stablehlo": export_stablehlo,
}
# The options that one format alone has.
_OWN = {
    "onnx": ("opset", "channels_first", "runtime", "processors"),
    "litert": ("channels_last",),
    "stablehlo": ("platforms",),
}


def _own_settings(options: argparse.Namespace, to: str) -> dict[str, Any]:
    """The settings of a format that are given; those of another are refused."""
    found = {}
    for name, settings in _OWN.items():
        for setting in settings:
            # Not given is None, or False of a flag.
            value = getattr(options, setting)
            if value is None or value is False:
                continue
            if name != to:
                option = f"--{setting.replace('_', '-')}"
                raise ValueError(f"{option} is an option of {name}, and this writes {to}")
            found[setting] = value
    return found


def _check_given(path: str) -> None:
    """Raise where there is no file to read, before anything is computed."""
    if os.path.isdir(path):
        there = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        hint = f", such as {os.path.join(path, there[0])}" if there else ""
        raise ValueError(f"{path} is a folder; give the file of a saved model{hint}")
    if not os.path.exists(path):
        raise ValueError(
            f"there is no file {path!r}; give one that jaxquant.save_quantized_model wrote"
        )


def _check_order(options: argparse.Namespace) -> None:
    """Raise where the file to write stands first, or a folder where it should."""
    if options.output is None:
        return
    if _by_suffix(options.path) and not _by_suffix(options.output):
        raise ValueError(
            f"the saved model comes first, then the file to write; {options.path} has the suffix "
            f"of {_by_suffix(options.path)}: is it convert {options.output} {options.path}?"
        )
    if os.path.isdir(options.output):
        name = os.path.splitext(os.path.basename(options.path))[0]
        suffix = _SUFFIXES[options.to] if options.to else _SUFFIXES["onnx"]
        raise ValueError(
            f"{options.output} is a folder; give the file to write, such as "
            f"{os.path.join(options.output, name + suffix)}"
        )


def _by_suffix(path: str | None) -> str | None:
    """The format that the suffix of a file tells, in whatever case."""
    suffix = os.path.splitext(path or "")[1].lower()
    return next((name for name, own in _SUFFIXES.items() if suffix == own), None)


def _format(options: argparse.Namespace) -> str:
    """The format that a model is converted to, as asked for or by the suffix of the file."""
    by_suffix = _by_suffix(options.output)
    # Either may be the slip, and a file of the wrong format would be found late.
    if None not in (options.to, by_suffix) and options.to != by_suffix:
        raise ValueError(
            f"{options.output} has the suffix of {by_suffix}, and --to {options.to} is another "
            "format; give one of them"
        )
    if options.to or by_suffix:
        return str(options.to or by_suffix)
    wanted = options.output or "the file to write"
    raise ValueError(
        f"the format of {wanted} is not known: give OUTPUT a suffix of "
        f"{', '.join(_SUFFIXES.values())}, or one of --to {', '.join(_SUFFIXES)}"
    )
