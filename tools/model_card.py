"""The model card that tools/export.py writes: what a model is, what it was trained on, how good it
is, what it is not.

Figures come from the checkpoint, from the summary.json of the run and from the checks of the
export; what nobody wrote down is said to be unknown.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from metrics import METRICS, SHOWN
from utils.checkpoint import digest
from utils.complexity import count_macs, count_parameters
from utils.exported import FORMATS

UNKNOWN_LICENCE = (
    "Not stated. The code that trained the model is under Apache-2.0; whether weights may be "
    "passed on, and used for "
    "what, is for the licence of the training data to say (`--licence` fills this in)"
)
INTENDED = (
    "Research on segmentation. Not a medical device: not for diagnosis or treatment without the "
    "validation and the "
    "approval that the law asks for"
)
OF_NNUNET = (
    "`nnUNetv2_predict_from_modelfolder -i FOLDER -o FOLDER -m THIS_FOLDER -f 0`; nnU-Net weights "
    "overlapping windows by a Gaussian and brings logits to the image's grid, so that labels at "
    "edges may differ from the scores below"
)
RUNNING = "python predict_{dims}d.py --model {name} --input FILE_OR_FOLDER --output FOLDER"


def neighbours(folder: Path, checkpoint: dict[str, Any]) -> dict[str, dict]:
    """Name -> `exported` part of the descriptions in `folder` that belong to the same weights."""
    found, weights = {}, digest(checkpoint["weights"])
    for path in sorted(folder.glob("*.json")):
        if path.with_suffix("").suffix not in FORMATS.values():
            continue
        try:
            exported = json.loads(path.read_text(encoding="utf-8"))["exported"]
        except (ValueError, KeyError, TypeError):  # somebody else's file
            continue
        if exported.get("weights") == weights:
            found[path.stem] = exported
    return found


def text(
    args: argparse.Namespace,
    checkpoint: dict[str, Any],
    network: nn.Module,
    multilabel: bool,
    path: Path,
    exported: dict[str, Any],
) -> str:
    """The card, in Markdown. path, exported: the model at hand; others of the same weights in
    `args.out` are listed.
    """
    config, described = checkpoint["config"], checkpoint["network"]
    models = neighbours(args.out, checkpoint) | {path.name: exported}
    shape = (1, described["in_channels"], *config["patch_size"])
    running = f"`{RUNNING.format(dims=len(config['patch_size']), name=path.name)}`"
    if exported["format"] == "nnunet":
        running = OF_NNUNET
    taught = (
        ""
        if not config.get("teacher") or config["method"] == "supervised"
        else f" by {config['teacher']}"
    )
    parts = [
        f"# {described['name']} for {config['dataset']}",
        "## Model",
        bullets(
            {
                "network": f"{described['name']} {described['arguments'] or ''}".strip(),
                "trained by": f"{config['method']}{taught} ({config['preset']}), "
                f"seed {config['seed']}, step "
                f"{checkpoint['step']} of {config['max_steps']}",
                "parameters": f"{count_parameters(network):,}",
                "multiply-adds": f"{count_macs(network, shape) / 1e9:.3f} G for one window",
                "input": f"{described['in_channels']} channel(s), "
                f"window {sides(config['patch_size'])}, any batch size, "
                f"float32",
                "output": f"logits of {described['num_classes']} "
                f"{'regions' if multilabel else 'classes'} on the "
                f"same grid",
                "code": checkpoint["code"],
            }
        ),
        "## Files",
        files(models),
        "Run it: " + running,
        "## Data",
        bullets(
            {
                "data set": config["dataset"],
                "format": checkpoint["dataset"]["format"],
                "cases": ", ".join(
                    f"{len(names)} {split}"
                    for split, names in checkpoint.get("cases", {}).items()
                    if names
                )
                or "unknown",
            }
        ),
        "## Classes",
        "\n".join(f"{index}. {name}" for index, name in enumerate(checkpoint["class_names"])),
        "The numbers are channels of the logits"
        + (
            "; the regions may overlap."
            if multilabel
            else " and ids in label files; 0 is the background."
        ),
        "## Preprocessing",
        "\n".join(
            f"{number}. {step}"
            for number, step in enumerate(preprocessing(checkpoint, multilabel), 1)
        ),
        "## Scores of the checkpoint",
        scores(args.ckpt),
        "## Export",
        checks(models),
        "## Licence",
        args.licence or UNKNOWN_LICENCE,
        "## Intended use",
        args.intended_use or INTENDED,
        "## Limits",
        bullets(limits(checkpoint)),
        "## Versions",
        f"{', '.join(f'{name} {number}' for name, number in exported['versions'].items())}; "
        f"{exported['date']}",
        f"```sh\n{exported['command']}\n```",
    ]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def sides(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def bullets(items: dict[str, str] | Sequence[str]) -> str:
    lines = (
        [f"{key}: {value}" for key, value in items.items()] if isinstance(items, dict) else items
    )
    return "\n".join(f"- {line}" for line in lines)


def wrapped(part: str) -> str:
    """Long lines of running text folded at 120 columns; tables, headings and code stay."""
    if part.startswith("```"):
        return part
    lines = []
    for line in part.splitlines():
        plain = line and line[0] not in "|#"
        indent = "  " if line.startswith("- ") else "   " if line[:1].isdigit() else ""
        lines += (
            textwrap.wrap(line, 120, subsequent_indent=indent, break_on_hyphens=False)
            if plain
            else [line]
        )
    return "\n".join(lines)


def files(models: dict[str, dict]) -> str:
    lines = ["| file | format | precision | MB |", "|---|---|---|---:|"]
    for name, exported in models.items():
        cells = (
            f"`{name}`",
            exported["format"],
            exported["precision"],
            f"{exported['bytes'] / 1e6:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def checks(models: dict[str, dict]) -> str:
    """What the export measured against PyTorch, and what int8 costs."""
    lines = [
        "| file | compared with PyTorch on | largest difference | largest value | labels alike |",
        "|---|---|---:|---:|---:|",
    ]
    costs = []
    for name, exported in models.items():
        for key, where in (
            ("windows", "windows of real size"),
            ("case", exported["checks"]["case"]["source"]),
        ):
            found = exported["checks"][key]
            lines.append(
                f"| `{name}` | {where} | {found['max_abs_difference']:.2e} | "
                f"{found['largest']:.3g} | "
                f"{100 * found['label_agreement']:.4f} % |"
            )
        if "dice" in exported["checks"]:
            dice = exported["checks"]["dice"]
            costs.append(
                f"`{name}`: mean Dice {100 * dice['int8']:.2f} % over {dice['cases']} "
                f"{dice['split']} cases, "
                f"{100 * dice['float']:.2f} % before quantisation: int8 costs "
                f"{100 * dice['cost']:.2f} points."
            )
    return "\n".join(lines) + "".join(f"\n\n{cost}" for cost in costs)


def preprocessing(checkpoint: dict[str, Any], multilabel: bool) -> list[str]:
    """What happens to an image before the network, and to the prediction after it, in words."""
    data, config = checkpoint["dataset"], checkpoint["config"]
    form, steps = data["format"], []
    if data.get("orientation"):
        steps.append(f"axes turned to {data['orientation']}")
    as_nnunet = data.get("intensity") == "nnunet"
    if as_nnunet:
        steps.append("cropped to the box of voxels that are not 0")
        for number, channel in enumerate(data["intensity_channels"]):
            numbers = [f"{key} {value}" for key, value in channel.items() if key != "scheme"]
            steps.append(f"channel {number}: {' '.join([channel['scheme'], *numbers])}")
        if data.get("spacing"):
            steps.append(f"resampled to {sides(data['spacing'])} mm, cubic, as nnU-Net does")
    elif data.get("spacing"):
        steps.append(f"resampled to {sides(data['spacing'])} mm, linear")
    if form == "brats":
        steps.append(
            "each channel (t1c, t1n, t2f, t2w): (x - mean) / standard deviation over its non-zero "
            "voxels"
        )
    elif form == "la":
        steps.append("axes turned to LPS, resampled to 0.625 mm, linear")
        steps.append("(x - mean) / standard deviation over the scan, cropped around the atrium")
    elif form == "acdc":
        steps.append("volume scaled to 0..1 by its minimum and maximum")
    elif form == "images2d":
        steps.append("RGB divided by 255")
    elif data.get("intensity") == "window":
        low, high = data["window"]
        steps.append(f"intensities {low:g}..{high:g} mapped to 0..1 and clipped")
    elif data.get("intensity") == "zscore":
        steps.append("each channel: (x - mean) / standard deviation over the volume")
    if data.get("crop_foreground") and not as_nnunet:
        steps.append("cropped to the box of voxels above 0")
    if checkpoint["kind"] == "3d":
        steps.append(
            f"windows of {sides(config['patch_size'])} that overlap by {config['overlap']:g}, "
            "logits averaged"
        )
    elif checkpoint["kind"] == "3d-semi":
        steps.append(
            f"windows of {sides(config['patch_size'])} every {sides(config['stride'])} voxels, "
            "softmax averaged"
        )
    else:
        steps.append(f"each slice or image resized to {sides(config['patch_size'])}")
    last = (
        "regions where the logit is at least 0" if multilabel else "the class of the largest value"
    )
    return [*steps, f"{last}, brought back to the image's own grid by nearest neighbour"]


def scores(ckpt: Path) -> str:
    """The table of the run's summary, if its test script was run."""
    name = "summary.json" if ckpt.stem == "best" else f"summary_{ckpt.stem}.json"
    path = ckpt.with_name(name)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        native = summary["native"]
        rows = [*native["classes"].items(), ("mean of cases", native["mean"])]
        unit = summary.get("unit", "mm")
        metrics = [key for key in SHOWN if key in native["mean"]]
        titles = [METRICS[key].title + f" {unit}" * METRICS[key].distance for key in metrics]
        lines = [f"| class | {' | '.join(titles)} |", f"|---{'|---:' * len(metrics)}|"]
        for label, row in rows:
            shown = []
            for key in metrics:
                value = row.get(key)
                shown.append("-" if value is None else f"{METRICS[key].factor * value:.2f}")
            lines.append(f"| {label} | {' | '.join(shown)} |")
        counts = native["counts"]
        note = (
            f"Shares in %, {native['cases']} {summary['split']} cases on their own grid "
            "(PyTorch, float32); "
            f"of {counts['pairs']} classes in all cases {counts['missed']} were missed and "
            f"{counts['spurious']} false positive, which the distances leave out."
        )
        if summary.get("selected_on_reported"):
            note += " The checkpoint was selected on these same cases: the scores are optimistic."
        return "\n".join(lines) + f"\n\n{note}"
    except FileNotFoundError:
        return f"Not measured: there is no {name} beside the checkpoint; the test script writes it."
    except (ValueError, KeyError, TypeError) as error:
        return (
            f"Not known: {name} beside the checkpoint is not a summary of the test scripts "
            f"({error!r})."
        )


def limits(checkpoint: dict[str, Any]) -> list[str]:
    """What a user must not expect."""
    cases = checkpoint.get("cases", {})
    trained = len(cases.get("train") or []) + len(cases.get("labelled") or [])
    counts = [f"{trained} labelled"] if trained else []
    if checkpoint["config"].get("unlabelled_batch") and "student" in checkpoint["config"]:
        counts.append(f"{len(cases['unlabelled'])} unlabelled (labelled by the teacher)")
    known = (
        f"{' and '.join(counts)} training units"
        if counts
        else "an unknown number of training cases"
    )
    found = [
        f"Trained on {known} of one data set: other scanners, protocols, populations, ages and "
        "diseases were not "
        f"tested, and scores there may be much lower.",
        "Every image gets a prediction: nothing tells that an image is of another body part or "
        "modality.",
        f"The window is fixed at {sides(checkpoint['config']['patch_size'])}; other sizes need "
        "another export.",
        "Softmax values are not calibrated probabilities.",
    ]
    if checkpoint["dataset"]["format"] == "la":
        found.append("The training scans were cropped around the atrium by means of their labels.")
    return found
