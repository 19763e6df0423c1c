"""Fine-tuning in the training scripts: where they start, what stays, what is refused."""

import pytest
import torch

from tests.scripts.conftest import run, train
from tests.scripts.test_train_crkd import make_site
from utils.checkpoint import digest, load_checkpoint

ALONE = ("--method", "supervised", "--student", "unet")
ENCODER = ("down_layer1.", "down_layer2.", "down_layer3.", "bottom_layer.")


def begun(weights, source, encoder):
    """That the encoder is the source's, statistics and all, and something else is not."""
    inside = {key for key in weights if key.startswith(encoder)}
    assert inside and all(torch.equal(weights[key], source[key]) for key in inside)
    return {key for key in weights.keys() - inside if not torch.equal(weights[key], source[key])}


def test_a_student_starts_from_weights_and_its_encoder_stays(workspace):
    train(*ALONE, cwd=workspace)
    first = workspace / "runs/tiny/supervised/unet/seed0"
    source = load_checkpoint(first / "best.pt")["weights"]
    (first / "best.pt").rename(workspace / "start.pt")
    train("--method", "supervised", "--student", "resunet", cwd=workspace)
    options = ("init_checkpoint=start.pt", "freeze=encoder", "tag=tuned", "diagnose_interval=1")
    for flags in (ALONE, ("--method", "at", "--teacher", "resunet")):
        out = train(*flags, "--opts", *options, cwd=workspace)
        assert "note: starts from start.pt" in out.stderr
        assert f"frozen: the encoder ({', '.join(p[:-1] for p in ENCODER)}), " in out.stderr
    folder = workspace / "runs/tiny/at/resunet-unet/seed0-tuned"
    last = load_checkpoint(folder / "last.pt")
    assert begun(last["student"], source, ENCODER) and begun(last["weights"], source, ENCODER)

    # what was read at the start is not asked for again
    (workspace / "start.pt").unlink()
    (folder / "last.previous.pt").replace(folder / "last.pt")
    again = run("train_3d_distill.py", "--resume", str(folder), cwd=workspace)
    assert "frozen: the encoder" in again.stderr and "starts from" not in again.stderr
    resumed = load_checkpoint(folder / "last.pt")
    for part in ("student", "weights", "method"):
        assert digest(resumed[part]) == digest(last[part])


def test_another_number_of_classes_and_what_is_refused(workspace):
    train(*ALONE, cwd=workspace)
    start = "runs/tiny/supervised/unet/seed0"
    source = load_checkpoint(workspace / start / "best.pt")["weights"]
    more = ("class_names=[background,ball,box,rod]", "absent_classes=[rod]", "dataset=other")
    options = (f"init_checkpoint={start}", "freeze=encoder", *more)
    out = train(*ALONE, "--opts", *options, cwd=workspace)
    assert "its head for 3 classes is left out, one for 4 is made anew" in out.stderr
    tuned = load_checkpoint(workspace / "runs/other/supervised/unet/seed0/last.pt")["weights"]
    inside = {key for key in tuned if key.startswith(ENCODER)}
    assert inside and all(torch.equal(tuned[key], source[key]) for key in inside)
    (workspace / "other.pt").write_bytes(b"no checkpoint")
    for option, expected in (
        ("freeze=encoder", "would keep random weights"),
        ("freeze=head", "unknown part 'head'; known: encoder"),
        ("init_checkpoint=none.pt", "none.pt: no such checkpoint"),
        ("init_checkpoint=other.pt", "other.pt: damaged or not a checkpoint"),
    ):
        refused = train(*ALONE, "--opts", option, "tag=refused", cwd=workspace, ok=False)
        assert refused.returncode and expected in refused.stderr, option
    refused = train(
        *("--method", "supervised", "--student", "resunet", "--opts", f"init_checkpoint={start}"),
        cwd=workspace,
        ok=False,
    )
    assert refused.returncode and "of the network unet, this run trains resunet" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_networks_of_few_labels_and_their_averages_start_from_weights(tmp_path, kind):
    site = make_site(tmp_path, kind)
    site.train("--method", "supervised")
    start = site.run_folder("supervised") / "best.pt"
    source = load_checkpoint(start)["weights"]
    averaged = "method_args={crkd: {threshold: 0.25, csd_samples: 16, ema_decay: 0.9}}"
    options = (averaged, f"init_checkpoint={start}", "freeze=encoder")
    out = site.train("--opts", *options)
    assert "frozen: the encoder (encoder), " in out.stderr
    folder = site.run_folder()
    last = load_checkpoint(folder / "last.pt")
    for name in ("network", "average"):
        own = {
            k.removeprefix(f"{name}."): v for k, v in last["method"].items() if k.startswith(name)
        }
        assert any("running_mean" in key for key in own)
        assert begun(own, source, ("encoder.",))
    assert begun(last["weights"], source, ("encoder.",))
    (folder / "last.previous.pt").replace(folder / "last.pt")
    site.train("--resume", "--opts", *options)
    resumed = load_checkpoint(folder / "last.pt")
    for part in ("method", "weights"):
        assert digest(resumed[part]) == digest(last[part])
