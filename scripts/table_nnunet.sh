#!/bin/sh
# The table of a shrunken nnU-Net in RESULTS.md: nnU-Net trained by itself on MSD Hippocampus (short, on a CPU), then
# students of 6 % and 1 % of its parameters, alone and under ACF-BCKD, KD and DIST. Two cores: three hours.
#
#   PATH=/path/of/nnunet/bin:$PATH sh scripts/table_nnunet.sh
#
# The environment of nnU-Net (requirements-nnunet.txt, with nnUNetv2_plan_and_preprocess) comes first in PATH; the project's
# .venv trains the students. EPOCHS of ITERATIONS: of nnU-Net. STEPS: of students. What is complete is not repeated.
# data/Task04_Hippocampus has the scans; data/nnunet gets all that nnU-Net writes.
set -e
nnunet=$(command -v nnUNetv2_plan_and_preprocess) || {
    echo "error: no nnUNetv2_plan_and_preprocess in PATH; put the environment of nnU-Net first" >&2
    exit 2
}
nnunet=$(dirname "$nnunet")/python
. "$(dirname "$0")/setup.sh"
work=$PWD/data/nnunet config=data/nnunet/hippocampus
export nnUNet_raw="$work/raw" nnUNet_preprocessed="$work/preprocessed" nnUNet_results="$work/results"
export nnUNet_compile=f nnUNet_n_proc_DA=1 OMP_NUM_THREADS=1
epochs=${EPOCHS:-26} iterations=${ITERATIONS:-50} steps=${STEPS:-1000}
data=$nnUNet_raw/Dataset004_Hippocampus
teacher=$nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres

if [ ! -f "$data/planned" ]; then
    $python - "$data" "$nnUNet_preprocessed/Dataset004_Hippocampus" <<'PYTHON'
"""The lists of splits/hippocampus as a raw data set of nnU-Net; its test list as imagesTs."""
import json
import shutil
import sys
from pathlib import Path

data, preprocessed = map(Path, sys.argv[1:])
source, lists = Path("data/Task04_Hippocampus"), {}
for name in ("train", "val", "test"):
    lines = Path(f"splits/hippocampus/{name}.txt").read_text().splitlines()
    lists[name] = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    part = "Ts" if name == "test" else "Tr"
    for kind, ending in (("images", "_0000"), ("labels", "")):
        (data / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for case in lists[name]:
            file = source / f"{kind}Tr" / f"{case}.nii.gz"
            shutil.copy(file, data / f"{kind}{part}" / f"{case}{ending}.nii.gz")
preprocessed.mkdir(parents=True, exist_ok=True)
folds = [{"train": lists["train"], "val": lists["val"]}]
(preprocessed / "splits_final.json").write_text(json.dumps(folds))
described = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "anterior": 1, "posterior": 2},
    "numTraining": len(lists["train"]) + len(lists["val"]),
    "file_ending": ".nii.gz",
}
(data / "dataset.json").write_text(json.dumps(described))
PYTHON
    nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres
    touch "$data/planned"
fi
if [ ! -f "$teacher/fold_0/checkpoint_final.pth" ]; then
    "$nnunet" - "$epochs" "$iterations" <<'PYTHON'
"""nnU-Net's trainer, with short epochs of batches of two and steps in bfloat16, for a CPU."""
import json
import os
import sys

import torch
from nnunetv2.run.run_training import get_trainer_from_args

plans = os.environ["nnUNet_preprocessed"] + "/Dataset004_Hippocampus/nnUNetPlans.json"
with open(plans) as file:
    changed = json.load(file)
changed["configurations"]["3d_fullres"]["batch_size"] = 2
with open(plans, "w") as file:
    json.dump(changed, file)


def in_bfloat16(step):
    def run(batch):  # autocast caches the cast weights as long as its context lasts: a step
        with torch.autocast("cpu", torch.bfloat16):
            return step(batch)

    return run


trainer = get_trainer_from_args(
    "4", "3d_fullres", 0, "nnUNetTrainer", "nnUNetPlans", device=torch.device("cpu")
)
trainer.num_epochs, trainer.num_iterations_per_epoch = map(int, sys.argv[1:])
trainer.num_val_iterations_per_epoch = 5
trainer.train_step = in_bfloat16(trainer.train_step)
trainer.validation_step = in_bfloat16(trainer.validation_step)
trainer.run_training()
PYTHON
fi

if [ ! -f $config.yaml ]; then
    $python tools/new_config.py --nnunet "$teacher" --data "$data" --name nnunet_hippocampus --networks nnunet \
        --fold-lists "$nnUNet_preprocessed/Dataset004_Hippocampus/splits_final.json" \
        --splits data/nnunet/splits --out $config.yaml
fi

student() {  # student <tag> <widths> <method> <settings>: train and test
    tag=$1 method=$3
    sed "s/\"features_per_stage\": \[[^]]*\]/\"features_per_stage\": [$2]/" $config.yaml > "$config-$tag.yaml"
    shift 3
    set -- --config "$config-$tag.yaml" --method "$method" --opts workers=0 "tag=$tag" "$@"
    run=$($python train_3d_distill.py "$@" --show-run)
    $python train_3d_distill.py --resume "$@"
    [ "$run/summary.json" -nt "$run/best.pt" ] || $python test_3d.py --ckpt "$run" --no-predictions
}

# the teacher as a checkpoint of this project, which is tested and timed like its students
student teacher "32, 64, 128, 256" supervised "init_checkpoint=$teacher" lr=1.0e-12 max_steps=1 val_interval=1
for method in supervised acf_bckd kd dist; do
    for width in 8 3; do
        student w$width "$width, $((2 * width)), $((4 * width)), $((8 * width))" $method \
            lr=0.01 "max_steps=$steps" "val_interval=$((steps / 4))" amp=bf16
    done
done
$python tools/results_table.py runs/nnunet_hippocampus/*/*/seed0-*
$python benchmarks/deployment.py --threads 2 --ckpt runs/nnunet_hippocampus/supervised/nnunet/seed0-teacher/best.pt \
    runs/nnunet_hippocampus/acf_bckd/nnunet-nnunet/seed0-w8/best.pt runs/nnunet_hippocampus/acf_bckd/nnunet-nnunet/seed0-w3/best.pt
