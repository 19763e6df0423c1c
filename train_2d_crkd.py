"""Train a 2D segmentation network with few labels: CRKD, or another semi-supervised method, or the
labels alone.

Methods live in methods/, one file each. A step: a batch of labelled images and, unless the method
is supervised, a batch of unlabelled ones in a weak and strong views of the same geometry; the
method makes the loss of them.

    python train_2d_crkd.py --config configs/acdc.yaml --labelled 3  # CRKD, 3 labelled patients
    python train_2d_crkd.py --config configs/acdc.yaml --labelled 3 --method supervised
    python train_2d_crkd.py --config configs/isic2018.yaml --label_rat 0.05 --resume

Results go to runs/<dataset>/<method>/<network>-<labelled>/seed<k>/;
`python test_2d.py --ckpt .../best.pt` scores them.
"""

import argparse
import dataclasses
import sys
from typing import Annotated

from methods import SSL_METHODS
from utils.config import training_flags

FLAGS = training_flags(
    __doc__, SSL_METHODS, {"network": "the network to train"}, labelled="patients or images"
)
if __name__ == "__main__":
    FLAGS.parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import numpy as np
import torch

from dataloaders import DATASETS, DataError, Dataset
from inference import autocast, predict_slices
from metrics import class_dice, mean_dice
from networks import NETWORKS
from utils import figures
from utils.config import Count, Given, constructing, from_flag, labelled_name, parse
from utils.diagnosis import Diagnosis
from utils.few_labels import MIX, Batches, FewLabels, open_data
from utils.modes import copied, on_device, seed_everything, statistics_estimated
from utils.registry import OfDims
from utils.run import Run, run_script
from utils.runlog import check_terms
from utils.schedules import set_lr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FewLabels):
    """Keys of this script; utils/few_labels.py and utils/run.py have those of others too. How the
    keys of the data are used: dataloaders/settings.py.
    """

    patch_size: tuple[Count, Count]  # pixels that every image is resized to
    labelled_batch: Count = 12  # images in a step
    unlabelled_batch: Count = 12
    network: Annotated[str, OfDims(NETWORKS, 2)] = "unet2d"
    eval_batch: Count = 16  # images

    set_aside = (*FewLabels.set_aside, "stride", "val_stride", "window_batch")

    @classmethod
    def adapted(cls, given: Given) -> list[str]:
        volumes = given.get("format", ("msd", ""))[0] in OfDims(DATASETS, 3)
        sides, source = given.get("patch_size", (None, ""))
        if volumes and isinstance(sides, list) and len(sides) == 3 and not from_flag((0, source)):
            given["patch_size"] = (sides[:2], source)
            note = f"note: patch_size {sides}: slices of {sides[:2]} across the third axis"
            return [*super().adapted(given), note]
        return super().adapted(given)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    return parse(Config, FLAGS, argv)


def evaluate(
    network: torch.nn.Module, dataset: Dataset, cases: list, run: Run
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean Dice over `cases` and of each class, at the images' own size, and a picture of the first
    case.
    """
    scores, picture = [], None
    for case in run.part(cases):
        volume = dataset.read(case)
        slices = torch.from_numpy(np.ascontiguousarray(dataset.slices(volume)))
        ids = predict_slices(network, slices, batch=run.cfg.eval_batch, amp=run.cfg.amp).numpy()
        prediction, label = dataset.unslice(ids, volume), volume["label"][0]
        kind = {"num_classes": dataset.num_classes, "annotated": dataset.annotated(case)}
        scores.append(class_dice(prediction, label, **kind))
        if picture is None:
            names = dataset.class_names[1:]
            shown = (volume["image"], label, prediction)
            picture = figures.compared(*shown, names, case.name, scores[-1])
    return mean_dice(run.world.merged(scores), dataset.class_names[1:]), picture


def main() -> int:
    args, cfg = parse_args()
    run = Run(cfg, args, f"{cfg.network}-{labelled_name(cfg.labelled)}")
    world, device = run.world, run.device
    dataset, splits = open_data(cfg, args, run)

    # Method, with the network that it trains, and optimiser
    seed_everything(cfg.seed)
    with constructing(f"{args.config}: network_args or method_args"):
        method = cfg.make_method(cfg.channels, dataset.num_classes)
    method = run.placed(method, torch.channels_last)
    run.begin(*method.networks)
    if cfg.compile:
        method.compile()
    run.seed_apart()
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = cfg.make_optimizer(trained)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    run.describe("2d-semi", cfg.network, cfg.channels, dataset.num_classes, splits)
    run.keep(method=method, optimizer=optimizer, scaler=scaler)
    parameters = method.network.parameters()
    diagnosis = Diagnosis(cfg.diagnose_interval, parameters, world, run.log, cfg.compile)

    batches = Batches(cfg, run, dataset, splits, method)
    labelled_batches = batches.labelled()
    if method.uses_unlabelled:
        unlabelled_batches = batches.unlabelled()
    if method.mixes:
        mix_batches = batches.unlabelled(MIX)

    def see_clean_images() -> None:
        """The same at each validation, for the statistics of batch norm."""
        for images in batches.clean():
            with autocast(device, cfg.amp):
                method.evaluated(images)

    for step in run.steps():  # one step = one batch, and one update for nearly all methods
        labelled, unlabelled = next(labelled_batches), {}
        cases = labelled.pop("case")
        if method.uses_unlabelled:
            unlabelled = next(unlabelled_batches)
            cases = cases + unlabelled.pop("case")
        if method.mixes:
            others = next(mix_batches)
            unlabelled |= {f"mix_{key}": others[key] for key in others if key != "case"}
        labelled, unlabelled = on_device(labelled, device), on_device(unlabelled, device)
        lr = cfg.lr_at(step, cfg.lr)
        set_lr(optimizer, lr)
        method.train()
        for _ in range(method.updates):  # several of one batch, of methods that ask for it
            run.watch.before()
            with autocast(device, cfg.amp):
                # the whole method: methods/<name>.py
                terms = method.loss(labelled, unlabelled or None, step)
                loss = sum(terms.values())
            check_terms(terms, method.monitor)
            diagnosis.measure(step, terms, scaler)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            world.average_gradients(trained)
            batch = {"labelled": labelled, "unlabelled": unlabelled}
            updated = run.watch.passes(step, terms, batch, cases, wait=run.settles)
            if updated:  # else the step is left out
                if cfg.grad_clip:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
                scaler.step(optimizer)
                scaler.update()
        if updated:
            method.after_step(step)
            run.averages.add(terms | method.monitor)

        if run.logs:
            run.record(terms, lr=lr)
        if run.saves or run.validates:
            world.average_statistics(method)
            with statistics_estimated(method.evaluated, see_clean_images, world.average):
                weights = copied(method.evaluated)
                if run.validates:
                    found = evaluate(method.evaluated, dataset, splits[cfg.select_on], run)
        if run.validates:
            run.show("train", method.pictures, dataset.num_classes)
            run.validated(*found, weights)
        if run.saves:
            run.save(weights)
    return run.end()


if __name__ == "__main__":
    sys.exit(run_script(main, DataError))
