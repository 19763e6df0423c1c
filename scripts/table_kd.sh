#!/bin/sh
# The commands behind every cell of the ACF-BCKD tables: 6 teachers, 12 students alone, 24 students under ACF-BCKD, and
# nine rivals with the U-Net (36 cells on BTCV and WORD, KD and AT on BraTS: 4). 82 cells for each seed, GPU-days in all.
#
#   sh scripts/table_kd.sh --dry-run                                  # print the commands
#   sh scripts/table_kd.sh --only 'btcv.* acf_bckd .*--student unet'  # run some: grep on the training command
#   sh scripts/table_kd.sh --seeds "0 1 2" --preset as_released -- workers=8 device=cuda
#
# --preset as_released is the released code's arithmetic; it concerns distilled students only. What follows -- are
# KEY=VALUE settings for every training call. Teachers come first: students learn from the teacher of seed 0. What is
# complete is not done again; an interrupted training goes on where it stopped. Results: tools/results_table.py --layout kd
set -e
dry= only=. seeds=0 preset=clean
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1; shift ;;
        --only) only=$2; shift 2 ;;
        --seeds) seeds=$2; shift 2 ;;
        --preset) preset=$2; shift 2 ;;
        --) shift; break ;;
        *) echo "error: unknown argument $1; known: --dry-run --only PATTERN --seeds LIST --preset NAME" >&2; exit 2 ;;
    esac
done
case $preset in clean | as_released) ;; *) echo "error: --preset is clean or as_released, got $preset" >&2; exit 2 ;; esac
. "$(dirname "$0")/words.sh"
if [ -z "$dry" ]; then . "$(dirname "$0")/setup.sh"; else python=python; fi

found=

cell() {  # cell <data set> <method> <teacher, or - for none> <student> <settings>: train and test, or print how
    dataset=$1 method=$2 teacher=$3 student=$4
    shift 4
    if [ "$method" != supervised ] && [ "$preset" != clean ]; then
        # class counts that the released configurations have wrong
        case "$dataset $method $teacher $student" in
            "word acf_bckd resunet mobile_unet" | "word acf_bckd resunet lcovnet")
                set -- "method_args={acf_bckd: {floor: 0.5, decay: 0.45, label_classes: 14}}" "$@" ;;
            "word ifvd resunet unet") set -- "method_args={ifvd: {num_label_classes: 14}}" "$@" ;;
        esac
        set -- "preset=$preset" "$@"
    fi
    [ $# -eq 0 ] || set -- --opts "$@"
    for seed in $seeds; do
        one_run "$@"
    done
}

one_run() {  # one_run [--opts <settings>]: of the cell and seed at hand
    set -- --student "$student" --seed "$seed" --resume "$@"
    [ "$teacher" = - ] || set -- --teacher "$teacher" "$@"
    set -- $python train_3d_distill.py --config "configs/$dataset.yaml" --method "$method" "$@"
    command=$(quoted "$@")
    printf '%s\n' "$command" | grep -q -e "$only" || return 0
    found=1
    if [ -n "$dry" ]; then
        printf '%s\npython test_3d.py --ckpt "$(%s --show-run)/best.pt" --published\n' "$command" "$command"
        return 0
    fi
    printf '\n== %s\n' "$command"
    "$@"
    run=$("$@" --show-run)
    [ "$run/summary.json" -nt "$run/best.pt" ] || $python test_3d.py --ckpt "$run/best.pt" --published
}

datasets="btcv word brats21" teachers="resunet segresnet" students="unet espnetv2 mobile_unet lcovnet"
for dataset in $datasets; do
    for network in $teachers; do cell "$dataset" supervised - "$network" "$@"; done
done
for dataset in $datasets; do
    for network in $students; do cell "$dataset" supervised - "$network" "$@"; done
done
for dataset in $datasets; do
    for teacher in $teachers; do
        for student in $students; do cell "$dataset" acf_bckd "$teacher" "$student" "$@"; done
    done
done
for dataset in btcv word; do
    for method in kd at nkd skd ifvd cwd dist dkd cirkd; do
        for teacher in $teachers; do cell "$dataset" "$method" "$teacher" unet "$@"; done
    done
done
for method in kd at; do
    for teacher in $teachers; do cell brats21 "$method" "$teacher" unet "$@"; done
done
[ -n "$found" ] || { echo "error: no command matches --only '$only'" >&2; exit 1; }
[ -n "$dry" ] || $python tools/results_table.py --layout kd
