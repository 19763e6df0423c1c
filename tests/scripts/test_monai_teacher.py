"""The network of a MONAI bundle teaches a student."""

import json

from losses import KD_METHODS
from tests.networks.test_monai_bundle import UNET, write_bundle, write_config
from tests.scripts.conftest import train
from utils.checkpoint import load_checkpoint

KD = ("--method", "kd", "--teacher", "zoo/bundle", "--student", "unet")
OF_LOGITS = {"acf_bckd", "kd", "nkd", "cwd", "dist", "dkd"}


def test_a_bundle_teaches_by_its_logits(workspace):
    folder, network = write_bundle(workspace / "zoo/bundle")
    out = train(*KD, "--labelled", "0", cwd=workspace)
    count = sum(p.numel() for p in network.parameters())
    (said,) = [line for line in out.stderr.splitlines() if "note: the teacher is" in line]
    assert "UNet of zoo/bundle/configs/inference.json, network_def" in said and f"{count:,}" in said
    run = workspace / "runs/tiny/kd/monai-unet-0-unlabelled/seed0"
    kinds = {json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()}
    assert {"teacher", "train", "val", "agreement"} <= kinds
    straight = load_checkpoint(run / "last.pt")
    # ACF-BCKD goes by its boundary terms; its teacher is named by a file
    named = ("--teacher", "zoo/bundle/configs/inference.json", "--opts", "max_steps=1")
    out = train("--student", "unet", *named, cwd=workspace)
    assert "acf_bckd without AFD and CFD" in out.stderr
    for method in KD_METHODS.keys() - OF_LOGITS:
        flags = ("--method", method, "--teacher", "zoo/bundle")
        refused = train(*flags, cwd=workspace, ok=False)
        assert refused.returncode, method
        listed = refused.stderr.rpartition("has logits alone, which do for ")[2].strip()
        assert set(listed.split(", ")) == OF_LOGITS, (method, refused.stderr)

    # other weights of the same network are another teacher
    state = {key: value + 1 for key, value in network.state_dict().items()}
    write_bundle(workspace / "other", weights=state)
    (workspace / "other/models/model.pt").replace(folder / "models/model.pt")
    (run / "last.previous.pt").replace(run / "last.pt")
    refused = train(*KD, "--labelled", "0", "--resume", cwd=workspace, ok=False)
    assert (
        refused.returncode
        and f"teacher: weights with the digest {straight['teacher'][:12]}" in (refused.stderr)
    )
    for change, expected in (
        ({"out_channels": 2}, "expected (1, 3, 16, 16, 16): one channel for each of background"),
        ({"channels": ["$import os"]}, "is an expression, which is code"),
    ):
        changed = UNET | change
        if "out_channels" in change:
            write_bundle(workspace / "two", changed)
            (workspace / "two/models/model.pt").replace(folder / "models/model.pt")
        write_config(folder, {"network_def": changed})
        refused = train(*KD, "--opts", "tag=refused", cwd=workspace, ok=False)
        assert refused.returncode and expected in refused.stderr
    refused = train("--teacher", "monai", cwd=workspace, ok=False)
    assert refused.returncode and "name its folder in its place" in refused.stderr
