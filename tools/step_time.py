"""How long a training step takes on this machine, for tools/new_config.py: a few steps on made-up
patches, in a few seconds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from losses.segmentation import SegmentationLoss
from networks import NETWORKS, build_network
from utils.run import resolve_device

# voxels of a step that is timed on a CPU; the time of convolutions is in proportion to them
TIMED_VOXELS = {2: 128 * 128, 3: 32 * 32 * 32}
REPEATS = 3
LONGEST = 0.5  # s, after which a step is not timed again


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: the shortest of some, after one that pays for what is done once. Longer
    ones had to wait for other programs.
    """
    taken: list[float] = []
    step()
    while len(taken) < REPEATS and sum(taken) < LONGEST:
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_patch(
    patch: Sequence[int], multiples: Sequence[int], batch: int, device: torch.device
) -> tuple[list[int], int]:
    """Patch and batch size that are timed: the given ones on a GPU, on a CPU smaller ones, halved
    where they are longest, in multiples that the networks take.
    """
    sides = list(patch)
    if device.type != "cpu":
        return sides, batch
    batch = min(batch, 2)  # of which norms can be taken, however small the patch is
    while math.prod(sides) * batch > TIMED_VOXELS[len(sides)]:
        smaller = [math.ceil(side / 2 / m) * m for side, m in zip(sides, multiples)]
        axis = max(range(len(sides)), key=lambda k: sides[k] - smaller[k])
        if smaller[axis] == sides[axis]:
            break
        sides[axis] = smaller[axis]
    return sides, batch


def multiples_of(networks: Mapping[str, Mapping[str, Any]], dims: int) -> list[int]:
    """What each side of a patch must be a multiple of for all networks. networks: name ->
    arguments.
    """
    strides = []
    for name, arguments in networks.items():
        network = NETWORKS[name]
        if hasattr(network, "multiples"):
            strides.append(network.multiples(**arguments))
        else:
            strides.append((network.stride,) * dims)
    return [math.lcm(*sides) for sides in zip(*strides)]


def made_up(
    batch: int, channels: int, classes: int, patch: Sequence[int], multilabel: bool
) -> tuple[Tensor, Tensor]:
    """Noise (B, C, *patch), and labels (B, 1 or K, *patch) in slabs along the first axis, each of
    one class, so that they have boundaries as organs do.
    """
    slabs = torch.arange(patch[0]) * classes // patch[0]
    ids = slabs.view(-1, *[1] * (len(patch) - 1)).expand(batch, 1, *patch).to(torch.uint8)
    if multilabel:
        ids = ids == torch.arange(classes).view(1, -1, *[1] * len(patch))
    return torch.randn(batch, channels, *patch), ids


def distillation_step(cfg, dataset, teacher_arguments: Mapping[str, Any] | None) -> float:
    """Seconds of a step of train_3d_distill.py. teacher_arguments: of the teacher's network; None
    where the student trains alone.
    """
    device, classes = resolve_device(cfg.device), dataset.num_classes
    networks = {cfg.student: cfg.network_arguments(cfg.student)}
    student = build_network(cfg.student, cfg.channels, classes, **networks[cfg.student]).to(device)
    teacher, kd = None, None
    if teacher_arguments is not None:
        networks[cfg.teacher] = teacher_arguments
        teacher = build_network(cfg.teacher, cfg.channels, classes, **teacher_arguments)
        teacher = teacher.to(device).eval()
        taps = student.feature_channels, teacher.feature_channels
        kd = cfg.make_method(*taps, classes, dataset.multilabel, dataset.incomplete).to(device)
    patch, batch = timed_patch(cfg.patch_size, multiples_of(networks, 3), cfg.batch, device)
    image, label = made_up(batch, cfg.channels, classes, patch, dataset.multilabel)
    image, label = image.to(device), label.to(device)
    parameters = [*student.parameters(), *(kd.parameters() if kd is not None else ())]
    optimizer, criterion = cfg.make_optimizer(parameters), SegmentationLoss(dataset.multilabel)

    def step() -> None:
        out = student(image, return_features=True)
        loss = criterion(out.logits, label)
        if kd is not None:
            with torch.no_grad():
                of_teacher = teacher(image, return_features=True)
            loss = loss + sum(kd(out, of_teacher, label, progress=0.5).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    share = math.prod(patch) * batch / (math.prod(cfg.patch_size) * cfg.batch)
    return seconds_of(step, device) / share


def few_labels_step(cfg, dataset) -> float:
    """Seconds of a step of the few-label scripts."""
    device, dims = resolve_device(cfg.device), len(cfg.patch_size)
    networks = {cfg.network: cfg.network_arguments(cfg.network)}
    sizes = cfg.patch_size, multiples_of(networks, dims), cfg.labelled_batch
    patch, batch = timed_patch(*sizes, device)
    method = cfg.make_method(cfg.channels, dataset.num_classes).to(device).train()
    image, label = made_up(batch, cfg.channels, dataset.num_classes, patch, False)
    image, label = image.to(device), label.to(device)
    views = {f"strong{k}": image for k in range(method.strong_views)}
    unlabelled = {"weak": image, "label": label, **views}
    unlabelled |= {f"mix_{key}": value for key, value in unlabelled.items()}
    optimizer = cfg.make_optimizer(p for p in method.parameters() if p.requires_grad)

    def step() -> None:
        for _ in range(method.updates):
            other = unlabelled if method.uses_unlabelled else None
            loss = sum(method.loss({"image": image, "label": label}, other, 0).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    share = math.prod(patch) * batch / (math.prod(cfg.patch_size) * cfg.labelled_batch)
    return seconds_of(step, device) / share
