"""Run folders as the scripts write them, without the training."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import yaml

CLASSES = ("liver", "left kidney", "duct")
FLAGS = ("absent", "missed", "spurious")


def write_run(
    runs: Path,
    method: str = "kd",
    seed: int = 0,
    *,
    cases: int = 12,
    gain: float = 0.0,
    tested: bool = True,
    diagnosed: bool = True,
    few_labels: bool = False,
    teacher_dice: float = 0.9,
    **settings,
) -> Path:
    """A run of 100 steps with generated scores; case 1 misses its duct, case 2 has none. gain: Dice
    above the rest.
    """
    rng = np.random.default_rng(seed + 100)
    config = {
        "dataset": "tiny",
        "method": method,
        "preset": "clean",
        "seed": seed,
        "tag": "",
        "patch_size": [16] * 3,
    }
    if few_labels:
        config |= {"network": "unet2d", "labelled": 3, "patch_size": [32, 32]}
        names = "unet2d-3"
    else:
        config |= {
            "student": "unet",
            "teacher": "resunet",
            "teacher_seed": 0,
            "teacher_checkpoint": "",
        }
        config |= {"diagnose_interval": 20}
        names = settings.get("student", "unet") if method == "supervised" else "resunet-unet"
    config |= settings
    folder = runs / "tiny" / method / names / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    distilled = method != "supervised" and not few_labels
    lines = [{"step": 0, "kind": "teacher", **of_classes(teacher_dice)}] if distilled else []
    for step in range(9, 100, 10):
        terms = {"seg": 1 / (step + 1)} | ({"kd": 0.1} if distilled else {})
        if distilled and diagnosed and (step + 1) % 20 == 0:
            share = 0.004
            lines.append(
                {
                    "step": step,
                    "kind": "diagnosis",
                    "loss_share/seg": 0.4,
                    "loss_share/kd": 0.6,
                    "grad_norm/seg": 1.0,
                    "grad_norm/kd": 0.1,
                    "grad_share/seg": 1 - share,
                    "grad_share/kd": share,
                    "cosine/kd": 0.2,
                }
            )
        lines.append(
            {
                "step": step,
                "kind": "train",
                "loss": sum(terms.values()),
                **terms,
                "lr": 0.1 - step / 1000,
            }
        )
        if (step + 1) % 50 == 0:
            lines.append({"step": step, "kind": "val", **of_classes(0.5 + step / 400 + gain)})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tested:
        write_scores(folder, config, scores_of(rng, cases, gain), few_labels)
    return folder


def of_classes(dice: float) -> dict:
    return {"dice": dice, **{name: dice - 0.05 * k for k, name in enumerate(CLASSES)}}


def scores_of(rng: np.random.Generator, cases: int, gain: float) -> list[dict]:
    hard = np.random.default_rng(0).uniform(0.5, 0.85, cases)  # of the cases: the same in all runs
    rows = []
    for k in range(cases):
        for name in CLASSES:
            dice = float(np.clip(hard[k] + gain + rng.normal(0, 0.02), 0, 1))
            row = {
                "case": f"case{k:02d}",
                "class": name,
                "dice": dice,
                "jaccard": dice / (2 - dice),
            }
            row |= {"hd95": 20 * (1 - dice), "asd": 5 * (1 - dice)} | dict.fromkeys(FLAGS, 0)
            if name == "duct" and k in (1, 2):
                zero = 0.0 if k == 1 else math.nan
                row |= {"dice": zero, "jaccard": zero, "hd95": math.nan, "asd": math.nan}
                row["missed" if k == 1 else "absent"] = 1
            rows.append(row)
    return rows


def write_scores(folder: Path, config: dict, rows: list[dict], few_labels: bool = False) -> None:
    """metrics.csv and summary.json as test_3d.py writes them, or as reporting.py does."""
    metrics = ("dice", "jaccard", "hd95", "asd")
    if few_labels:
        titles = [
            "dice_clean",
            "jaccard_clean",
            "hd95_pooled_voxels_clean",
            "asd_one_sided_voxels_clean",
        ]
    else:
        titles = ["dice", "jaccard", "hd95_pooled_mm", "asd_mm"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        # runs with few labels as they were before the column had its name
        flags = ["absent", "missed", "spurious" if few_labels else "false_positive"]
        writer.writerow([*([] if few_labels else ["space"]), "case", "class", *titles, *flags])
        for space in [None] if few_labels else ["resampled", "native"]:
            for row in rows:
                values = ["" if math.isnan(row[m]) else f"{row[m]:.6g}" for m in metrics]
                flags = [row[flag] for flag in FLAGS]
                writer.writerow(
                    [*([] if few_labels else [space]), row["case"], row["class"], *values, *flags]
                )
    known = {m: [row[m] for row in rows if not math.isnan(row[m])] for m in metrics}
    means = {
        "cases": len({row["case"] for row in rows}),
        "mean": {m: sum(v) / len(v) for m, v in known.items()},
        "penalised": {"mean": {"hd95": 30.5, "asd": 12.5}},
        "counts": {"pairs": len(rows), **{flag: sum(row[flag] for row in rows) for flag in FLAGS}},
    }
    summary = {
        "dataset": config["dataset"],
        "method": config["method"],
        "preset": "clean",
        "seed": config["seed"],
        "tag": "",
        "teacher": config.get("teacher") if config["method"] != "supervised" else None,
        "student": config.get("student", config.get("network")),
        "checkpoint": "best.pt",
        "step": 100,
        "max_steps": 100,
        "split": "test",
        "selected_on_reported": False,
        "hd95_definition": "pooled",
        "empty_policy": "nan",
        "native": means,
        "parameters": 1234567,
        "gmacs": 1.25,
        "patch_size": config["patch_size"],
        "ms_per_volume": 12.0,
        "device": "CPU",
        "threads": 1,
        "code": "abc123",
        **(
            {"labelled": 3, "protocol": "clean", "unit": "voxels"}
            if few_labels
            else {"resampled": means}
        ),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
