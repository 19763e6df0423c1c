"""Train a 3D segmentation network: a student under a frozen teacher, or one network by itself.

Distillation methods live in losses/, one file each; ACF-BCKD is the default. A step: the teacher
and the student see the same patches, the student's loss is the segmentation loss plus the weighted
terms of the method.

    # the teacher
    python train_3d_distill.py --config configs/btcv.yaml --method supervised --student resunet
    python train_3d_distill.py --config configs/btcv.yaml --teacher resunet  # ACF-BCKD, U-Net
    # the student alone
    python train_3d_distill.py --config configs/btcv.yaml --method supervised --student unet
    # 8 labelled scans; the teacher labels the others
    python train_3d_distill.py --config configs/btcv.yaml --teacher resunet --labelled 8

Results go to runs/<dataset>/<method>/<teacher>-<student>/seed<k>/;
`python test_3d.py --ckpt .../best.pt` scores them.
"""

import argparse
import dataclasses
import sys
from typing import Annotated

from losses import KD_METHODS
from methods import SSL_METHODS
from networks import NETWORKS
from utils.config import training_flags

FLAGS = training_flags(
    __doc__,
    ("supervised", *KD_METHODS, "or several at once: acf_bckd+dist"),
    {
        "teacher": f"one of {', '.join(NETWORKS)}, an nnU-Net's results folder, a MONAI bundle",
        "student": "the network to train, from the same names",
    },
    labelled="scans",
    zero=True,
)
if __name__ == "__main__":
    FLAGS.parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import numpy as np
import torch

from dataloaders import DATASETS, DataError, Dataset, Report, build_dataset
from inference import autocast, predict_labels
from losses.incomplete import completed
from losses.segmentation import SegmentationLoss
from metrics import class_dice, mean_dice
from networks import build_network, init_weights
from utils import figures
from utils.config import Count, Natural, constructing, parse
from utils.diagnosis import Diagnosis
from utils.disagreement import without_disagreeing
from utils.distillation import Batches, Distillation, load_teacher, note_idle, open_lists
from utils.modes import copied, seed_everything, statistics_estimated
from utils.registry import OfDims
from utils.run import Run, run_script
from utils.runlog import check_terms
from utils.schedules import set_lr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Distillation):
    """Keys of this script; utils/distillation.py and utils/run.py have others. How the keys of the
    data are used: dataloaders/settings.py.
    """

    patch_size: tuple[Count, Count, Count]  # voxels of the preprocessed grid
    format: Annotated[str, OfDims(DATASETS, 3)] = "msd"
    cases_per_batch: Count = 1
    crops_per_case: Count = 4  # batch size = cases_per_batch x crops_per_case
    val_start: Natural = 0  # first step at which to validate
    overlap: Annotated[float, "[0, 1)"] = 0.5  # of neighbouring windows
    window_batch: Count = 4

    other_names = tuple(SSL_METHODS)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    return parse(Config, FLAGS, argv)


def predict(network: torch.nn.Module, sample: dict, dataset: Dataset, run: Run) -> np.ndarray:
    """Ids (H, W, D) or regions (K, H, W, D) of a case as `dataset.read` gives it."""
    prediction = predict_labels(
        network,
        torch.from_numpy(np.array(sample["image"])).to(run.device),
        patch_size=run.cfg.patch_size,
        overlap=run.cfg.overlap,
        window_batch=run.cfg.window_batch,
        amp=run.cfg.amp,
        multilabel=dataset.multilabel,
    )
    return prediction.cpu().numpy()


def evaluate(
    network: torch.nn.Module, dataset: Dataset, cases: list, run: Run
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean Dice over `cases` and of each class, and a picture of one case of this process."""
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    scores, picture = [], None
    for case in run.part(cases):
        sample = dataset.read(case)
        prediction = predict(network, sample, dataset, run)
        label = np.array(sample["label"] if dataset.multilabel else sample["label"][0])
        kind = dataset.num_classes, dataset.multilabel, dataset.annotated(case)
        scores.append(class_dice(prediction, label, *kind))
        if picture is None:
            picture = figures.panel(sample["image"], label, prediction, names, case.name, scores[0])
    return mean_dice(run.world.merged(scores), names), picture


def agreement(network: torch.nn.Module, dataset: Dataset, compared: list, run: Run) -> dict:
    """Mean Dice, and of each class, with the teacher: `compared` has cases of this process with its
    prediction. No score, since no label takes part.
    """
    scores = []
    for case, of_teacher in compared:
        prediction = predict(network, dataset.read(case), dataset, run)
        scores.append(class_dice(prediction, of_teacher, dataset.num_classes, dataset.multilabel))
    return mean_dice(run.world.merged(scores), dataset.classes.values())


def main() -> int:
    args, cfg = parse_args()
    run = Run(cfg, args, cfg.networks)
    world, device = run.world, run.device

    # Data: disjoint lists, everything read and checked before the first step
    with constructing(args.config):
        dataset = build_dataset(**cfg.dataset_arguments(), allow_outside=args.allow_outside)
    report = Report()
    splits = open_lists(cfg, dataset, report, run)
    chosen = splits[cfg.select_on]
    teacher, known = load_teacher(cfg, args, dataset, splits)
    with world.main_first():  # so that one process fills the cache
        used = {split: cases for split, cases in splits.items() if split != "unlabelled" or cases}
        dataset.prepare(used, report, chosen=cfg.select_on)
        report.stop()
        run.open(report)

    # Student, teacher, method
    seed_everything(cfg.seed)
    memory = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
    # whether labels may have voxels, or lack classes, that nobody labelled
    kd, incomplete = None, dataset.incomplete or cfg.unsure
    with constructing(f"{args.config}: network_args or method_args"):
        arguments = cfg.network_arguments(cfg.student)
        student = build_network(cfg.student, cfg.channels, dataset.num_classes, **arguments)
        student = run.placed(init_weights(student), torch.channels_last_3d)
        run.begin(student)
        if teacher is not None:
            teacher = teacher.to(device, memory_format=memory)
            taps = student.feature_channels, teacher.feature_channels
            kind = dataset.num_classes, dataset.multilabel, incomplete
            kd = cfg.make_method(*taps, *kind).to(device)
    splits = without_disagreeing(cfg, teacher, dataset, splits, run, predict)
    if cfg.compile:
        student.compile()
    if cfg.compile and teacher is not None:
        teacher.compile()
    run.seed_apart()
    seg_loss = SegmentationLoss(dataset.multilabel, incomplete)

    # Optimiser
    of_student = [p for p in student.parameters() if p.requires_grad]
    of_method = [p for p in kd.parameters() if p.requires_grad] if kd is not None else []
    trained = of_student + of_method
    note_idle(cfg, run, bool(of_method), teacher)
    split = bool(cfg.method_lr and of_method)
    groups = [{"params": group} for group in ([of_student, of_method] if split else [trained])]
    optimizer = cfg.make_optimizer(groups)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    run.describe("3d", cfg.student, cfg.channels, dataset.num_classes, splits, teacher, known)
    run.keep(student=student, method=kd, optimizer=optimizer, scaler=scaler)
    diagnosis = Diagnosis(cfg.diagnose_interval, student.parameters(), world, run.log, cfg.compile)

    batches = Batches(cfg, run, dataset, splits)

    def see_clean_images() -> None:
        """Training patches, the same at each validation, for the statistics of batch norm."""
        for batch in batches.clean():
            with autocast(device, cfg.amp):
                student(batch["image"].to(device, memory_format=memory))

    if teacher is not None and chosen and not run.start:
        scores = known or evaluate(teacher, dataset, chosen, run)[0]
        run.teacher_validated(scores)
    # what the teacher says of unlabelled scans
    compared = [(c, predict(teacher, dataset.read(c), dataset, run)) for c in batches.compared]
    training_batches = batches.training()
    for step in run.steps():  # one step = one optimiser update
        batch = next(training_batches)
        # (B, C, H, W, D)
        image = batch["image"].to(device, non_blocking=True, memory_format=memory)
        # (B, 1 or K, H, W, D), but for the patches of unlabelled scans, which come last
        label = batch["label"].to(device, non_blocking=True)
        annotated = None
        if incomplete:  # which classes the labels tell, (B, K)
            annotated = batch["annotated"].to(device, non_blocking=True)
        lr = cfg.lr_at(step, cfg.lr)
        set_lr(optimizer, lr)
        if len(groups) > 1:
            optimizer.param_groups[1]["lr"] = cfg.lr_at(step, cfg.method_lr)
        run.watch.before()
        with autocast(device, cfg.amp):
            student_out, monitor = student(image, return_features=True), {}
            if kd is not None:
                with torch.no_grad():
                    teacher_out = teacher(image, return_features=True)
            if cfg.taught:  # their label is the teacher's prediction
                rest = slice(len(label), None)
                truth = batch["truth"].to(device, non_blocking=True)  # where known, to compare
                of_teacher = teacher, image[rest], teacher_out.logits[rest]
                found, monitor = cfg.taught_labels(*of_teacher, truth, dataset.multilabel)
                label = torch.cat([label, found])
            terms = {"seg": seg_loss(student_out.logits, label, annotated)}
            if kd is not None:
                if incomplete:  # what was not annotated, as the teacher sees it
                    how = dataset.multilabel, not getattr(kd, "incomplete", False)
                    label = completed(label, teacher_out.logits, annotated, *how)
                distilled = kd(student_out, teacher_out, label, progress=step / cfg.max_steps)
                check_terms(distilled, getattr(kd, "monitor", {}), others=terms)
                if step < cfg.warmup_steps:
                    share = step / cfg.warmup_steps
                    distilled = {name: share * value for name, value in distilled.items()}
                terms |= distilled
            loss = sum(terms.values())
        diagnosis.measure(step, terms, scaler)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        world.average_gradients(trained)
        updated = run.watch.passes(step, terms, batch, batch["case"], wait=run.settles)
        if updated:  # else the step is left out
            if cfg.grad_clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            run.averages.add(terms | getattr(kd, "monitor", {}) | monitor)

        if run.logs:
            run.record(terms, lr=lr)
        if run.saves or run.validates:
            world.average_statistics(student)
            with statistics_estimated(student, see_clean_images, world.average):
                weights = copied(student)
                if run.validates:
                    found = evaluate(student, dataset, chosen, run) if chosen else ({}, None)
                    agreed = agreement(student, dataset, compared, run) if cfg.taught else {}
            if run.validates:
                run.validated(*found, weights, agreed)
            run.save(weights)
    return run.end()


if __name__ == "__main__":
    sys.exit(run_script(main, DataError))
