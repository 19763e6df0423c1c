#!/bin/sh
# Every distillation method with each teacher on MSD Hippocampus (real MRI), in short trainings that a laptop can do:
# a U-Net of 123 k parameters, 1000 steps, one seed. Prints one table. Two cores: about three hours.
#
#   sh scripts/table_hippocampus.sh            # all rows
#   METHODS="kd acf_bckd" TEACHERS=resunet SEEDS="0 1 2" STEPS=3000 sh scripts/table_hippocampus.sh
#
# The teachers are those of seed 0 (ResU-Net 2000 steps, SegResNet 1000 steps, learning rate 0.05). Students learn at 0.02:
# at the papers' 0.01 these narrow networks are slow to begin, and at 0.05 CWD diverged. What is complete is not repeated.
set -e
. "$(dirname "$0")/setup.sh"
config=configs/hippocampus.yaml
steps=${STEPS:-1000}
common="workers=0 max_steps=$steps val_interval=$((steps / 2)) lr=${LR:-0.02} tag=s$steps"

run_cell() {  # run_cell <flags of train_3d_distill.py ...>: train and test; adds the run to $runs
    run=$($python train_3d_distill.py --config "$config" "$@" --show-run)
    printf '\n== %s\n' "$run"
    $python train_3d_distill.py --config "$config" --resume "$@"
    [ "$run/summary.json" -nt "$run/best.pt" ] || $python test_3d.py --ckpt "$run/best.pt" --no-predictions
    runs="$runs $run"
}

teachers=${TEACHERS:-resunet segresnet}
for teacher in $teachers; do
    steps_of_teacher=2000
    [ "$teacher" = resunet ] || steps_of_teacher=1000
    run_cell --method supervised --student "$teacher" --opts workers=0 max_steps=$steps_of_teacher val_interval=250 lr=0.05
done
for seed in ${SEEDS:-0}; do
    # shellcheck disable=SC2086
    run_cell --method supervised --student unet --seed "$seed" --opts $common
    for teacher in $teachers; do
        for method in ${METHODS:-kd at nkd skd ifvd cwd dist dkd cirkd acf_bckd}; do
            # shellcheck disable=SC2086
            run_cell --teacher "$teacher" --student unet --method "$method" --seed "$seed" --opts $common
        done
    done
done
printf '\n== results\n'
# shellcheck disable=SC2086
$python tools/results_table.py $runs
