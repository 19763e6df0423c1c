#!/bin/sh
# Every distillation method with each teacher on MSD Hippocampus (real MRI), in short trainings that a laptop can do:
# a U-Net of 123 k parameters, 400 steps, one seed. Prints one table. Two cores: about an hour.
#
#   sh scripts/table_hippocampus.sh            # all rows
#   METHODS="kd acf_bckd" TEACHERS=resunet SEEDS="0 1 2" STEPS=1000 sh scripts/table_hippocampus.sh
#
# The teachers are those of seed 0 (2000 steps ResU-Net, 600 steps SegResNet at the papers' learning rate, 0.01). The
# students' is 0.05: at 0.01 a narrow U-Net has hardly begun to learn after 400 steps. What is complete is not repeated.
set -e
. "$(dirname "$0")/setup.sh"
config=configs/hippocampus.yaml
steps=${STEPS:-400}
common="workers=0 max_steps=$steps val_interval=$((steps / 2)) lr=0.05 tag=s$steps"

run_cell() {  # run_cell <flags of train_3d_distill.py ...>: train and test; adds the run to $runs
    run=$($python train_3d_distill.py --config "$config" "$@" --show-run)
    printf '\n== %s\n' "$run"
    $python train_3d_distill.py --config "$config" --resume "$@"
    [ "$run/summary.json" -nt "$run/best.pt" ] || $python test_3d.py --ckpt "$run/best.pt" --no-predictions
    runs="$runs $run"
}

run_cell --method supervised --student resunet --opts workers=0 max_steps=2000
run_cell --method supervised --student segresnet --opts workers=0 max_steps=600 val_interval=100
for seed in ${SEEDS:-0}; do
    # shellcheck disable=SC2086
    run_cell --method supervised --student unet --seed "$seed" --opts $common
    for teacher in ${TEACHERS:-resunet segresnet}; do
        for method in ${METHODS:-kd at nkd skd ifvd cwd dist dkd cirkd acf_bckd}; do
            # shellcheck disable=SC2086
            run_cell --teacher "$teacher" --student unet --method "$method" --seed "$seed" --opts $common
        done
    done
done
printf '\n== results\n'
# shellcheck disable=SC2086
$python tools/results_table.py $runs
