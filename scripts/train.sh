#!/bin/sh
# Everything behind one comparison, by the configuration. Distillation: train a teacher (if there is none yet), the
# student alone and the distilled student. Few labels (ACDC, LA, ISIC-2018, Kvasir-SEG): the labels alone, then CRKD.
# Tests all of them, prints one table and draws one picture.
#
#   sh scripts/train.sh                                      # BTCV, ResU-Net -> U-Net, ACF-BCKD
#   sh scripts/train.sh configs/hippocampus.yaml
#   TEACHER=resunet STUDENT=unet METHOD=acf_bckd SEED=1 sh scripts/train.sh configs/btcv.yaml workers=8 device=cuda
#   LABELLED=7 METHOD=crkd sh scripts/train.sh configs/acdc.yaml
#
# Arguments after the configuration are KEY=VALUE settings for every training call. What is complete is not done again;
# an interrupted training goes on where it stopped.
set -e
. "$(dirname "$0")/setup.sh"
config=${1:-configs/btcv.yaml}
[ $# -eq 0 ] || shift
teacher=${TEACHER:-resunet} student=${STUDENT:-unet} seed=${SEED:-0}
[ -f "$config" ] || { echo "error: $config: no such configuration" >&2; exit 1; }
case $(sed -n 's/^format: *\([a-z0-9]*\).*/\1/p' "$config") in
    acdc | images2d) train=train_2d_crkd.py test=test_2d.py method=${METHOD:-crkd} ;;
    la) train=train_3d_crkd.py test=test_3d.py method=${METHOD:-crkd} ;;
    *) train=train_3d_distill.py test=test_3d.py method=${METHOD:-acf_bckd} ;;
esac

run_cell() {  # run_cell <number and title> <flags of the training script ...>: train and test; sets $run
    title=$1
    shift
    run=$($python $train --config "$config" "$@" --show-run)
    printf '\n== %s: %s\n' "$title" "$run"
    $python $train --config "$config" --resume "$@"
    if [ ! "$run/summary.json" -nt "$run/best.pt" ]; then
        $python $test --ckpt "$run/best.pt"
    fi
}

if [ $train = train_3d_distill.py ]; then
    run_cell "1/3 teacher $teacher" --method supervised --student "$teacher" ${1:+--opts "$@"}
    first=$run
    run_cell "2/3 student $student alone" --method supervised --student "$student" --seed "$seed" ${1:+--opts "$@"}
    second=$run
    run_cell "3/3 student $student under $teacher by $method" \
        --method "$method" --teacher "$teacher" --student "$student" --seed "$seed" ${1:+--opts "$@"}
else
    first=
    run_cell "1/2 the labels alone" --method supervised --seed "$seed" \
        ${LABELLED:+--labelled "$LABELLED"} ${1:+--opts "$@"}
    second=$run
    run_cell "2/2 $method" --method "$method" --seed "$seed" ${LABELLED:+--labelled "$LABELLED"} ${1:+--opts "$@"}
fi
printf '\n== results\n'
$python tools/results_table.py ${first:+"$first"} "$second" "$run"
$python tools/figure.py "$second" "$run" --out "$run/comparison.png"
