"""A training step on a GPU waits for nothing: counted on the meta device, from which no value can
be read.

Tensors there have shapes and no content, and code takes the path that it takes on every device but
the CPU. What would make the host wait for a GPU is counted: values that are read, shapes that
depend on values, and copies from pageable memory.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import KD_METHODS, PRESETS, build_kd
from losses.segmentation import SegmentationLoss
from methods import SSL_METHODS, build_method
from methods.acmt import STRATEGIES
from networks import build_network
from tests.scripts.conftest import make_workspace, train
from tests.scripts.test_train_crkd import TWO_DECODERS, make_site
from utils import run, schedules
from utils.schedules import build_optimizer

META = torch.device("meta")
# Operations whose result, or its shape, the host has to wait for
READING = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "bincount",
    "histc",
    "multinomial",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "repeat_interleave",
}


class Waits(TorchDispatchMode):
    """Lists the operations on the meta device for which the host would wait for a GPU; what is read
    is 0.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [t for t in tensors if t.device == META]
        here = [t for t in tensors if t.device != META and t.ndim]
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target = kwargs.get("device", source.device) if name == "_to_copy" else args[0].device
            leaves = source.device == META and torch.device(target) != META
            enters = source.device != META and torch.device(target) == META
            waits = not kwargs.get(
                "non_blocking", args[2] if name == "copy_" and len(args) > 2 else False
            )
            if leaves or (enters and waits):
                self.found.append(name)
            if leaves:
                copy = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return copy if name == "_to_copy" else args[0].copy_(copy)
        elif there and name in READING:
            self.found.append(name)
            if name in ("_local_scalar_dense", "item"):
                return torch.zeros((), dtype=there[0].dtype).item()
            if name in ("is_nonzero", "equal"):
                return False
        elif there and name.startswith("index") and name != "index_select":
            masks = [
                t
                for t in tree_leaves(args[1])
                if isinstance(t, torch.Tensor) and t.dtype == torch.bool
            ]
            filled = name == "index_put_" and args[2].numel() == 1  # a masked_fill
            if here or (masks and not filled):
                self.found.append(name)
        elif there and here:
            self.found.append(f"{name} of tensors on two devices")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """There is no autocast on the meta device."""
    autocast = torch.autocast

    def or_nothing(device_type, *rest, **more):
        return (
            contextlib.nullcontext()
            if device_type == "meta"
            else autocast(device_type, *rest, **more)
        )

    monkeypatch.setattr(torch, "autocast", or_nothing)


# The counting itself.


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.zeros(3).to(META),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.index_put_((x > 0,), torch.zeros(3, device=META)),
        lambda x: x.unique(),
        lambda x: x.long().bincount(minlength=4),
    ],
)
def test_what_waits_is_counted(waits):
    with Waits() as counted, contextlib.suppress(RuntimeError, NotImplementedError):
        waits(torch.zeros(3, device=META))
    assert len(counted.found) == 1, counted.found


def test_what_does_not_wait_is_not_counted():
    x = torch.zeros(3, 4, device=META)
    with Waits() as counted:
        x[x > 0] = 1.0
        x[torch.arange(2, device=META)].where(x[:2] > 0, 0.0).sum()
        torch.zeros(3, 4).to(META, non_blocking=True)
        (x * torch.tensor(2.0)).topk(2, dim=1)
        torch.rand(3).sum().item()  # on the CPU
    assert counted.found == []


# Steps.


def update(parameters, name="sgd"):
    """An optimiser as on a GPU: several tensors at once."""
    optimizer = build_optimizer(name, parameters, 0.01, 0.9, 1e-4, nesterov=False)
    for group in optimizer.param_groups:
        group["foreach"] = True
    return optimizer


def has_released_form(method, multilabel):
    """'dist', 'ifvd' and others refuse some presets."""
    with contextlib.suppress(ValueError):
        channels = build_network("unet", 1, 3).feature_channels
        build_kd(method, channels, channels, 3, multilabel=multilabel, preset="as_released")
        return True
    return False


def distillation_step(student, teacher, forms, seg_loss, optimizer, image, label):
    """One update with the terms of all forms of a method, as in the training script; -> the
    loss.
    """
    student_out = student(image, return_features=True)
    loss = seg_loss(student_out.logits, label)
    with torch.no_grad():
        teacher_out = teacher(image, return_features=True)
    for kd in forms:
        loss = loss + sum(kd(student_out, teacher_out, label, progress=0.5).values())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0
    )
    optimizer.step()
    return loss


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("method", KD_METHODS)
def test_a_step_of_distillation_waits_for_nothing(method, multilabel):
    classes = 3
    with META:
        teacher = build_network("resunet", 1, classes).eval().requires_grad_(False)
        student = build_network("unet", 1, classes).train()
        image = torch.zeros(2, 1, 16, 16, 16)
        label = torch.zeros(2, classes if multilabel else 1, 16, 16, 16, dtype=torch.uint8)
        forms = [
            build_kd(
                method,
                student.feature_channels,
                teacher.feature_channels,
                classes,
                multilabel=multilabel,
                preset=preset,
            ).train()
            for preset in PRESETS
            if preset == "clean" or has_released_form(method, multilabel)
        ]
    trained = [p for module in (student, *forms) for p in module.parameters()]
    optimizer, seg_loss = update(trained), SegmentationLoss(multilabel)
    with Waits() as waits:
        distillation_step(student, teacher, forms, seg_loss, optimizer, image, label)
    assert waits.found == []
    assert all(p.grad is not None for p in student.parameters())


VARIANTS = {
    "crkd": [
        {},
        {"pseudo_mode": "joint", "statistics": "clean"},
        {"feature_space": "projected", "csd_pool": 2},
        {"ema_decay": 0.99, "ema_for": "both", "csd_threshold": 0.7, "lec_masked": True},
    ],
    "acmt": [{"strategy": strategy} for strategy in STRATEGIES],
}
CELLS = [
    (method, dims, arguments, preset)
    for (method, cls), preset in itertools.product(SSL_METHODS.items(), PRESETS)
    for dims in cls.dimensions
    for arguments in (
        VARIANTS.get(method, [{}]) if preset == "clean" else VARIANTS.get(method, [{}])[:2]
    )
]


def few_label_batches(trained, make):
    """A labelled and an unlabelled batch with the views that a method wants. make: gives images (B,
    1, *spatial).
    """
    label = make().round().byte()
    unlabelled = {f"strong{k}": make() for k in range(trained.strong_views)} | {
        "weak": make(),
        "label": label,
    }
    if trained.mixes:
        unlabelled |= {f"mix_{key}": value for key, value in unlabelled.items()}
    return {"image": make(), "label": label}, unlabelled


@pytest.mark.parametrize("method, dims, arguments, preset", CELLS)
def test_a_step_of_a_semi_supervised_method_waits_for_nothing(method, dims, arguments, preset):
    network = "unet2d" if dims == 2 else TWO_DECODERS.get(method, "vnet")
    sides = (32,) * dims
    with META:
        trained = build_method(
            method, lambda: build_network(network, 1, 2), max_steps=10, preset=preset, **arguments
        ).train()
        labelled, unlabelled = few_label_batches(trained, lambda: torch.zeros(2, 1, *sides))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = update(parameters, "adamw" if method == "crossmatch" else "sgd")
    with Waits() as waits:
        for _ in range(trained.updates):
            terms = trained.loss(labelled, unlabelled if trained.uses_unlabelled else None, 4)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
        trained.after_step(4)
    assert waits.found == []
    assert any(p.grad is not None for p in trained.network.parameters())


# The loops of the scripts.


class Enough(Exception):
    """Ends a training after the steps that are looked at."""


def waits_of_each_step(monkeypatch, start, steps=4):
    """Run a script on the meta device; -> how often each of its first steps waits, from `set_lr` to
    `set_lr`.
    """
    at, waits = [], Waits()

    def set_lr(optimizer, lr, original=schedules.set_lr):
        at.append(len(waits.found))
        if len(at) > steps:
            raise Enough
        original(optimizer, lr)

    monkeypatch.setattr(run, "resolve_device", lambda name: META)
    monkeypatch.setattr(schedules, "set_lr", set_lr)
    with pytest.raises(Enough), waits:
        start()
    return np.diff(at).tolist()


OPTIONS = ("log_interval=2", "max_steps=100", "val_interval=100", "save_interval=100")


@pytest.mark.parametrize("method", ["acf_bckd", "cirkd"])
def test_the_distillation_script_waits_when_it_logs(method, tmp_path, monkeypatch):
    folder = make_workspace(tmp_path)
    options = (
        *OPTIONS,
        "grad_clip=1.0",
        "method_args={cirkd: {pixel_queue: 100, pixel_contrast: 9}}",
    )
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=1", cwd=folder)
    counts = waits_of_each_step(
        monkeypatch, lambda: train("--method", method, "--opts", *options, cwd=folder)
    )
    assert [count > 0 for count in counts] == [False, True, False, True]


@pytest.mark.parametrize("kind, method", [("acdc", "unimatch"), ("la", "crkd")])
def test_the_semi_supervised_scripts_wait_when_they_log(kind, method, tmp_path, monkeypatch):
    site = make_site(tmp_path, kind)
    counts = waits_of_each_step(
        monkeypatch, lambda: site.train("--method", method, "--opts", *OPTIONS)
    )
    assert [count > 0 for count in counts] == [False, True, False, True]
