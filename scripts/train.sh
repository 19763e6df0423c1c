#!/bin/sh
# Train a teacher (if there is none yet), the student alone and the distilled student; test all three; print one table.
#
#   sh scripts/train.sh                                      # BTCV, ResU-Net -> U-Net, ACF-BCKD
#   sh scripts/train.sh configs/hippocampus.yaml
#   TEACHER=resunet STUDENT=unet METHOD=acf_bckd SEED=1 sh scripts/train.sh configs/btcv.yaml workers=8 device=cuda
#
# Arguments after the configuration are KEY=VALUE settings for every training call. What is complete is not done again;
# an interrupted training goes on where it stopped.
set -e
. "$(dirname "$0")/setup.sh"
config=${1:-configs/btcv.yaml}
[ $# -eq 0 ] || shift
teacher=${TEACHER:-resunet} student=${STUDENT:-unet} method=${METHOD:-acf_bckd} seed=${SEED:-0}

run_cell() {  # run_cell <number and title> <flags of train_3d_distill.py ...>: train and test; sets $run
    title=$1
    shift
    run=$($python train_3d_distill.py --config "$config" "$@" --show-run)
    printf '\n== %s: %s\n' "$title" "$run"
    $python train_3d_distill.py --config "$config" --resume "$@"
    if [ ! "$run/summary.json" -nt "$run/best.pt" ]; then
        $python test_3d.py --ckpt "$run/best.pt"
    fi
}

run_cell "1/3 teacher $teacher" --method supervised --student "$teacher" ${1:+--opts "$@"}
first=$run
run_cell "2/3 student $student alone" --method supervised --student "$student" --seed "$seed" ${1:+--opts "$@"}
second=$run
run_cell "3/3 student $student under $teacher by $method" \
    --method "$method" --teacher "$teacher" --student "$student" --seed "$seed" ${1:+--opts "$@"}
printf '\n== results\n'
$python tools/results_table.py "$first" "$second" "$run"
$python tools/figure.py "$second" "$run" --out "$run/comparison.png"
