"""What only a GPU can show. The rest of the suite is about the CPU and hides GPUs
(tests/conftest.py); so

ON_GPU=1 python -m pytest tests/test_cuda.py
"""

import copy
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from inference import fast_copy, predict_labels, predict_slices
from losses import KD_METHODS, PRESETS, build_kd, distance
from losses.segmentation import SegmentationLoss
from methods import build_method
from networks import NETWORKS, build_network, init_weights
from tests.scripts.conftest import ROOT, make_workspace, run, train
from tests.scripts.test_train_3d_distill import digest, stop_after
from tests.scripts.test_train_crkd import TWO_DECODERS, make_site
from tests.test_no_synchronisation import (
    CELLS,
    distillation_step,
    few_label_batches,
    has_released_form,
    update,
)
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = "cuda"
CLASSES = 3


@pytest.fixture
def _full_float32(monkeypatch):
    """Convolutions in float32, not TF32, so that the CPU is a reference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def no_waiting():
    """A function that makes the waits for the GPU that PyTorch notices (not all) errors until the
    test ends.
    """
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def balls(batch: int, multilabel: bool, side: int = 24) -> torch.Tensor:
    """Ids of two balls, or three nested regions; uint8."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(side).float()] * 3, indexing="ij"))
    radii = [((grid - side / 2 - k) ** 2).sum(0).sqrt() for k in range(batch)]
    if multilabel:
        return torch.stack([torch.stack([r < side / n for n in (3, 4, 6)]) for r in radii]).byte()
    return torch.stack([(r < side / 3).byte() + (r < side / 6).byte() for r in radii])[:, None]


# Values.


@pytest.mark.parametrize("spatial", [(17, 12), (13, 9, 11), (70, 3, 130), (1, 5, 40)])
def test_distances_are_those_of_the_cpu(spatial):
    if importlib.util.find_spec("triton"):
        assert distance._gpu_transform() is not distance.separable_boundary_distance_squared
    masks = torch.rand(6, *spatial, generator=torch.Generator().manual_seed(0)) > 0.7
    masks[0], masks[1] = True, False
    others = masks.transpose(-1, -2).contiguous().transpose(-1, -2).roll(1, 1)
    expected = distance.boundary_distance_squared(masks, others)
    assert torch.equal(
        distance.boundary_distance_squared(masks.to(CUDA), others.to(CUDA)).cpu(), expected
    )
    plain = [
        distance.separable_boundary_distance_squared(part.to(CUDA)) for part in (masks, others)
    ]
    assert torch.equal(sum(plain).cpu(), expected)
    assert distance.boundary_distance_squared(masks[:0].to(CUDA)).shape == masks[:0].shape


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
# the two that are left out draw
@pytest.mark.parametrize("method", [name for name in KD_METHODS if name not in ("cirkd", "emkd")])
def test_terms_and_gradients_are_those_of_the_cpu(method, preset, multilabel):
    if preset == "as_released" and not has_released_form(method, multilabel):
        pytest.skip("has no released form")
    torch.manual_seed(0)
    teacher = init_weights(build_network("resunet", 1, CLASSES)).eval().requires_grad_(False)
    student = init_weights(build_network("unet", 1, CLASSES)).eval()  # no dropout: it draws
    kd = build_kd(
        method,
        student.feature_channels,
        teacher.feature_channels,
        CLASSES,
        multilabel=multilabel,
        preset=preset,
    ).eval()
    label = balls(2, multilabel)
    # The networks are untrained; without something of the label the predictions would have no
    # boundary.
    towards = (
        label.float()
        if multilabel
        else torch.nn.functional.one_hot(label[:, 0].long(), CLASSES).movedim(-1, 1)
    )
    image = torch.randn(2, 1, 24, 24, 24)
    results = []
    for device in ("cpu", CUDA):
        t, s, k = (copy.deepcopy(module).to(device) for module in (teacher, student, kd))
        with torch.no_grad():
            teacher_out = t(image.to(device), return_features=True)
            teacher_out = teacher_out._replace(
                logits=teacher_out.logits + 6 * towards.to(device) - 3
            )
        student_out = s(image.to(device), return_features=True)
        student_out = student_out._replace(
            logits=student_out.logits + 3 * towards.to(device).roll(2, 2) - 1
        )
        terms = k(student_out, teacher_out, label.to(device), progress=0.5)
        (
            sum(terms.values()) + SegmentationLoss(multilabel)(student_out.logits, label.to(device))
        ).backward()
        gradient = torch.cat([p.grad.flatten() for p in s.parameters() if p.grad is not None]).cpu()
        results.append(({name: value.item() for name, value in terms.items()}, gradient))
    (terms, gradient), (terms_there, gradient_there) = results
    assert terms_there == pytest.approx(terms, rel=1e-3, abs=1e-6)
    assert (gradient_there - gradient).norm() < 1e-2 * gradient.norm()


@pytest.mark.usefixtures("_full_float32")
@pytest.mark.parametrize("amp, agree", [("off", 0.999), ("bf16", 0.97), ("fp16", 0.99)])
@pytest.mark.parametrize("network", [name for name in NETWORKS if name.startswith("unet")])
def test_labels_are_those_of_the_cpu(network, amp, agree):
    torch.manual_seed(0)
    net = init_weights(build_network(network, 1, CLASSES)).eval()
    if network == "unet2d":
        slices = torch.rand(4, 1, 64, 64)
        here, there = (
            predict_slices(net, slices),
            predict_slices(net.to(CUDA), slices.to(CUDA), amp=amp),
        )
    else:
        image = torch.rand(1, 40, 36, 30)
        here = predict_labels(net, image, patch_size=(24, 24, 24))
        there = predict_labels(net.to(CUDA), image.to(CUDA), patch_size=(24, 24, 24), amp=amp)
    assert (there.cpu() == here).float().mean() > agree


@pytest.mark.usefixtures("_full_float32")
def test_the_fast_copy_is_close():
    torch.manual_seed(0)
    net = init_weights(build_network("unet", 1, CLASSES)).eval().to(CUDA)
    image = torch.rand(1, 40, 36, 30, device=CUDA)
    plain, fast = (predict_labels(n, image, patch_size=(24, 24, 24)) for n in (net, fast_copy(net)))
    assert fast.device.type == CUDA and (plain == fast).float().mean() > 0.97


# No waiting: what tests/test_no_synchronisation.py counts on the meta device, by PyTorch's own
# check.


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("method", KD_METHODS)
def test_a_step_of_distillation_does_not_wait(method, multilabel, no_waiting):
    teacher = build_network("resunet", 1, CLASSES).to(CUDA).eval().requires_grad_(False)
    student = build_network("unet", 1, CLASSES).to(CUDA).train()
    image = torch.rand(2, 1, 24, 24, 24, device=CUDA)
    label = balls(2, multilabel).to(CUDA)
    forms = [
        build_kd(
            method,
            student.feature_channels,
            teacher.feature_channels,
            CLASSES,
            multilabel=multilabel,
            preset=preset,
        )
        .to(CUDA)
        .train()
        for preset in PRESETS
        if preset == "clean" or has_released_form(method, multilabel)
    ]
    trained = [p for module in (student, *forms) for p in module.parameters()]
    optimizer, seg_loss = update(trained), SegmentationLoss(multilabel)
    for repeat in range(3):
        if repeat == 1:  # the first step fills caches
            no_waiting()
        loss = distillation_step(student, teacher, forms, seg_loss, optimizer, image, label)
    torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("method, dims, arguments, preset", CELLS)
def test_a_step_of_a_semi_supervised_method_does_not_wait(
    method, dims, arguments, preset, no_waiting
):
    network = "unet2d" if dims == 2 else TWO_DECODERS.get(method, "vnet")
    sides = (32,) * dims
    trained = build_method(
        method, lambda: build_network(network, 1, 2), max_steps=10, preset=preset, **arguments
    )
    trained = trained.to(CUDA).train()
    labelled, unlabelled = few_label_batches(trained, lambda: torch.rand(2, 1, *sides, device=CUDA))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = update(parameters, "adamw" if method == "crossmatch" else "sgd")
    for step in range(3):
        if step == 1:
            no_waiting()
        for _ in range(trained.updates):
            terms = trained.loss(labelled, unlabelled if trained.uses_unlabelled else None, step)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
        trained.after_step(step)
    torch.cuda.set_sync_debug_mode("default")
    assert all(term.isfinite() for term in terms.values())


# The scripts.


MODES = [[], ["--amp", "bf16"], ["--amp", "fp16"], ["--channels-last"], ["--compile"]]


@pytest.mark.parametrize("modes", MODES, ids=" ".join)
def test_distillation_trains_and_is_tested_in_every_mode(modes, tmp_path):
    folder = make_workspace(tmp_path)
    train("--method", "supervised", "--student", "resunet", "--device", CUDA, *modes, cwd=folder)
    for method in ("acf_bckd", "cirkd"):
        options = ("method_args={cirkd: {pixel_queue: 100, pixel_contrast: 9}}",)
        train("--method", method, "--device", CUDA, *modes, "--opts", *options, cwd=folder)
        (best,) = folder.glob(f"runs/tiny/{method}/*/*/best.pt")
        run("test_3d.py", "--ckpt", str(best), "--device", CUDA, cwd=folder)
        summary = json.loads((best.parent / "summary.json").read_text())
        assert summary["device"] == torch.cuda.get_device_name() and np.isfinite(
            summary["native"]["mean"]["dice"]
        )


@pytest.mark.parametrize("kind, script", [("acdc", "test_2d.py"), ("la", "test_3d.py")])
@pytest.mark.parametrize("method", ["crkd", "unimatch"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_few_labels_train_and_are_tested_in_every_mode(kind, script, method, amp, tmp_path):
    site = make_site(tmp_path, kind)
    site.train("--method", method, "--device", CUDA, "--amp", amp)
    (best,) = tmp_path.glob(f"runs/*/{method}/*/*/best.pt")
    run(script, "--ckpt", str(best), "--device", CUDA, cwd=tmp_path)
    summary = json.loads((best.parent / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()


def test_a_run_of_the_gpu_is_tested_on_the_cpu_with_the_same_result(tmp_path):
    folder = make_workspace(tmp_path)
    train("--method", "supervised", "--device", CUDA, cwd=folder)
    (best,) = folder.glob("runs/tiny/supervised/*/*/best.pt")
    scores = []
    for device in (CUDA, "cpu"):
        run("test_3d.py", "--ckpt", str(best), "--device", device, cwd=folder)
        scores.append(
            json.loads((best.parent / "summary.json").read_text())["native"]["mean"]["dice"]
        )
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_an_interrupted_training_goes_on_to_the_same_weights(amp, tmp_path):
    """With --deterministic, to the last bit. In processes of their own: the flag is to come before
    anything else.
    """
    folder = make_workspace(tmp_path)
    train("--method", "supervised", "--student", "resunet", "--device", CUDA, cwd=folder)
    options = (
        "--teacher",
        "resunet",
        "--device",
        CUDA,
        "--deterministic",
        "--amp",
        amp,
        "--opts",
        "max_steps=6",
    )
    command = [sys.executable, str(ROOT / "train_3d_distill.py"), "--config", "tiny.yaml"]
    base = folder / "runs/tiny/acf_bckd/resunet-unet"
    subprocess.run([*command, *options, "tag=straight"], cwd=folder, check=True, timeout=300)
    stop_after(2, options, folder, base / "seed0-broken")
    assert load_checkpoint(base / "seed0-broken/last.pt")["step"] < 6
    subprocess.run(
        [*command, "--resume", *options, "tag=broken"], cwd=folder, check=True, timeout=300
    )
    straight, broken = (
        load_checkpoint(base / name / "last.pt") for name in ("seed0-straight", "seed0-broken")
    )
    for part in ("weights", "method"):
        assert digest(straight[part]) == digest(broken[part])
    assert straight["scaler"] == broken["scaler"]
    for mine, other in zip(straight["rng"][0]["cuda"], broken["rng"][0]["cuda"], strict=True):
        assert torch.equal(mine, other)


def test_too_little_memory_is_said_in_a_sentence(tmp_path):
    folder = make_workspace(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        result = train(
            "--method",
            "supervised",
            "--device",
            CUDA,
            "--opts",
            "patch_size=[96,96,96]",
            "crops_per_case=8",
            cwd=folder,
            ok=False,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the GPU has too little memory" in result.stderr
