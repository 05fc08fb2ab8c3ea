"""The accuracy table as Markdown, by itself or between two marks of a document."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import zoo
from experiments.accuracy.published import PADDLESLIM, PEERS, Figures, best_of_peers
from experiments.errors import SettingsError
from experiments.files import write_text

BEGIN = "<!-- accuracy table: begin -->"
END = "<!-- accuracy table: end -->"

TITLES = {
    "googlenet": "GoogLeNet",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "resnet50": "ResNet50",
    "resnet101": "ResNet101",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "cifar10_resnet20": "ResNet20, CIFAR-10",
    # Trained by us, for as long as there was time, in place of those that no package carries.
    "cifar10_resnet101": "ResNet101, CIFAR-10 (stand-in)",
    "cifar10_vgg16": "VGG16, CIFAR-10 (stand-in)",
    "cifar10_vgg19": "VGG19, CIFAR-10 (stand-in)",
}
# Two tables, each as wide as a page: what int8 costs, and what it takes.
ACCURACY = (
    "network",
    "method",
    "float32 top-1 / top-5",
    "int8 top-1 / top-5",
    "top-1 loss [95 %]",
    "top-5 loss [95 %]",
    "agreement",
    "SQNR",
)
COST = ("network", "method", "MB", "times smaller", "quantize", "evaluate")

Row = Mapping[str, Any]


def render(
    models: Sequence[str], rows: Mapping[str, Sequence[Row]], notes: Mapping[str, str]
) -> str:
    """The tables and what they are of.

    Args:
      models: the networks, in their order.
      rows: the finished rows of each.
      notes: for a network whose rows are not all there, why.
    """
    finished = [row for model in models for row in rows.get(model, ())]
    parts = [_table(ACCURACY, [_accuracy(row) for row in finished])]
    parts.append("\n".join(f"- {_title(m)}: {notes[m]}" for m in models if m in notes))
    parts += [_table(COST, [_cost(row) for row in finished]), _legend(finished)]
    if any(map(_has_others, models)):
        parts.append(_others(models))
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 2) -> str:
    """A table whose first columns are text and whose others are figures; "" without rows."""
    if not rows:
        return ""
    rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
    return "\n".join(map(_line, (columns, rule, *rows)))


def no_weights(model: str) -> str:
    """What a row without weights says: how to get them."""
    variants = [name for name in zoo.MODELS if name.startswith(f"{model}_")]
    others = f"; files of other frameworks: `--models={','.join(variants)}`" if variants else ""
    return (
        "no weights: no package carries them. Give a file (`--config.weights."
        f"{model}=FILE`) or train them (`experiments/train.py`){others}"
    )


def write(path: str | Path, table: str) -> None:
    """Writes the table to a file, or between the marks of one that is there.

    Raises:
      ValueError: as `around`.
    """
    before, after = around(path)
    write_text(path, f"{before}{BEGIN}\n{table}{END}{after}")


def around(path: str | Path) -> tuple[str, str]:
    """What stands before and after the table in a document.

    Raises:
      ValueError: the file is there and has not both marks, once each and in their order.
    """
    path = Path(path)
    if not path.exists():
        return "", "\n"
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", path.read_text(encoding="utf-8"))
    if parts[1::2] != [BEGIN, END]:
        raise SettingsError(f"{path}: the table goes between two lines, {BEGIN} and {END}")
    return parts[0], parts[-1]


def _accuracy(row: Row) -> list[str]:
    fp32, int8 = row["fp32"], row["int8"]
    return [
        _title(row["model"]),
        row["method"],
        f"{fp32['top1']:.2f} / {fp32['top5']:.2f}",
        f"{int8['top1']:.2f} / {int8['top5']:.2f}",
        _loss(row["top1_loss"]),
        _loss(row["top5_loss"]),
        f"{row['agreement']:.2f} %",
        "∞" if row["sqnr_db"] is None else f"{_signed(row['sqnr_db'], 1)} dB",
    ]


def _cost(row: Row) -> list[str]:
    fp32, int8 = row["fp32"], row["int8"]
    return [
        _title(row["model"]),
        row["method"],
        f"{fp32['megabytes']:.2f} → {int8['megabytes']:.2f}",
        f"{fp32['megabytes'] / int8['megabytes']:.2f}",
        f"{row['calibration_seconds']:.0f} s",
        f"{fp32['seconds']:.0f} → {int8['seconds']:.0f} s",
    ]


def _legend(rows: Sequence[Row]) -> str:
    """What the figures are, and the images, programs and cores that they were measured with."""
    if not rows:
        return ""
    images: dict[str, list[str]] = {}
    for row in rows:
        evaluation, calibration = row["evaluation"], row["calibration"]
        same = all(evaluation[k] == calibration[k] for k in ("name", "fingerprint"))
        of = " of the same set" if same else f" of {calibration['name']}"
        text = f"{row['images']} images of {evaluation['name']}, "
        text += f"{calibration['images'] or 'all'} to calibrate on{of}"
        images.setdefault(text, [])
        if _title(row["model"]) not in images[text]:
            images[text].append(_title(row["model"]))
    if len(images) == 1:
        data = next(iter(images))
    else:
        data = "; ".join(f"{', '.join(names)}: {text}" for text, names in images.items())
    programs = sorted({f"jaxquant {r['jaxquant']}, jax {r['jax']}, {r['backend']}" for r in rows})
    cores = sorted({row["cores"] for row in rows})
    return (
        f"Measured on {data}; {'; '.join(programs)}. Losses are in points of accuracy, negative "
        "where int8 is better; the brackets hold Tango's 95 % interval for paired proportions. "
        "Agreement: images with the same first class as float32. SQNR: of the logits. Quantize: "
        "calibration and quantization, compilation included. Evaluate: float32 and int8, decoding "
        f"included and compilation not. A network ran on {' or '.join(map(str, cores))} "
        f"core{'s' if cores[-1] > 1 else ''}."
    )


def _has_others(model: str) -> bool:
    return model in PADDLESLIM or best_of_peers(model) is not None


def _others(models: Sequence[str]) -> str:
    """What other systems lose on the same networks."""
    columns = ("loss / agreement / SQNR", *PEERS, "best of these", "PaddleSlim's loss")
    rows = []
    for model in filter(_has_others, models):
        figures = [*(peer.get(model) for peer in PEERS.values()), best_of_peers(model)]
        paddleslim = PADDLESLIM.get(model)
        rows.append(
            [
                _title(model),
                *(_figures(f) if f else "–" for f in figures),
                _signed(paddleslim.loss, 2) if paddleslim else "–",
            ]
        )
    return _table(columns, rows, texts=1) + (
        "\n\nThese peers quantized the same float32 weights with 100 ImageNet calibration images "
        "and were evaluated on 650 validation images; the best is of each figure by itself. "
        "PaddleSlim's losses are its published ones, on the whole validation set. Neither is "
        "measured by this repository (`experiments/accuracy/published.py`)."
    )


def _title(model: str) -> str:
    return TITLES.get(model, model)


def _loss(loss: Row) -> str:
    return f"{_signed(loss['points'], 2)} [{_signed(loss['low'], 2)}, {_signed(loss['high'], 2)}]"


def _figures(figures: Figures) -> str:
    loss, agreement, sqnr = figures
    return f"{_signed(loss, 2)} / {agreement:.1f} % / {_signed(sqnr, 1)} dB"


def _signed(value: float, digits: int) -> str:
    """A number with a minus sign, and without one before a zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
