#!/bin/sh
# The commands behind every cell of the ACF-BCKD tables: 6 teachers, 12 students alone, 24 students under ACF-BCKD, and
# nine rivals with the U-Net (36 cells on BTCV and WORD, KD and AT on BraTS: 4). 82 cells for each seed, GPU-days in all.
# The same rows of any other data set with a configuration, at the protocol of its file.
#
#   sh scripts/table_kd.sh --dry-run                                  # print the commands, a cell a line
#   sh scripts/table_kd.sh --only 'btcv.* acf_bckd .*--student unet'  # run some: grep on the training command
#   sh scripts/table_kd.sh --seeds "0 1 2" --preset as_released -- workers=8 device=cuda
#   sh scripts/table_kd.sh --datasets mouse_brain --teachers resunet --students unet --seeds "0 1 2" --jobs 2 -- workers=0
#   sh scripts/table_kd.sh --datasets hippocampus --teachers resunet --students unet --methods "acf_bckd+dist dist" \
#       --teacher-settings "lr=0.05 grad_clip=1.0 max_steps=1200"
#
# --methods names the rows: ACF-BCKD is run with all --students, others, and several at once (acf_bckd+dist), with the
# first one. --jobs: trainings at a time, beyond one each of one thread, in the order of the list, which has the longest
# first. --preset as_released is the released code's arithmetic; it concerns distilled students only. What follows -- are
# KEY=VALUE settings for every training call, --teacher-settings those of the teachers beside them. Teachers come first:
# students learn from the teacher of seed 0. What is complete is not done again; an interrupted training goes on where it
# stopped. A student that fails does not keep the others from being run; a teacher does. Results: tools/results_table.py
# --layout kd. As a Slurm array: docs/scaling.md
set -e
dry= only=. seeds=0 preset=clean jobs=1 methods= teacher_settings=
datasets="btcv word brats21" teachers="resunet segresnet" students="unet espnetv2 mobile_unet lcovnet"
known="--dry-run --only PATTERN --seeds LIST --preset NAME --datasets LIST --teachers LIST --students LIST"
known="$known --methods LIST --teacher-settings LIST --jobs N -- KEY=VALUE ..."
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1; shift; continue ;;
        --) shift; break ;;
    esac
    [ $# -gt 1 ] || { echo "error: unknown argument or no value: $1; known: $known" >&2; exit 2; }
    case $1 in
        --only) only=$2 ;;
        --seeds) seeds=$2 ;;
        --preset) preset=$2 ;;
        --datasets) datasets=$2 ;;
        --teachers) teachers=$2 ;;
        --students) students=$2 ;;
        --methods) methods=$2 ;;
        --teacher-settings) teacher_settings=$2 ;;
        --jobs) jobs=$2 ;;
        *) echo "error: unknown argument $1; known: $known" >&2; exit 2 ;;
    esac
    shift 2
done
case $preset in clean | as_released) ;; *) echo "error: --preset is clean or as_released, got $preset" >&2; exit 2 ;; esac
case $jobs in
    '' | *[!0-9]* | 0*) echo "error: --jobs is a number of trainings at a time, 1 or more, got $jobs" >&2; exit 2 ;;
esac
case " $methods " in
    *" supervised "*) echo "error: --methods: students alone are always a row; leave supervised out" >&2; exit 2 ;;
esac
line_end='
'
case $* in *"$line_end"*) echo "error: a setting has a line end, and a cell is a line" >&2; exit 2 ;; esac
. "$(dirname "$0")/words.sh"
if [ -z "$dry" ]; then . "$(dirname "$0")/setup.sh"; else python=python; fi
[ "$jobs" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

cell() {  # cell <data set> <method> <teacher, or - for none> <student> <settings>: its trainings, one for each seed
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

one_run() {  # one_run [--opts <settings>]: print the training of the cell and seed at hand
    set -- --student "$student" --seed "$seed" --resume "$@"
    [ "$teacher" = - ] || set -- --teacher "$teacher" "$@"
    set -- $python train_3d_distill.py --config "configs/$dataset.yaml" --method "$method" "$@"
    quoted "$@" | grep -e "$only" || true
}

# What one cell does: train and test, unless that is done. Of several at a time only what fails is shown.
do_cell='
    command=$1 log=
    [ "$jobs" = 1 ] || log=$(mktemp)
    failed() {
        if [ "$log" ]; then tail -n 20 "$log"; rm "$log"; fi
        exit 1
    }
    logged() { if [ "$log" ]; then "$@" >> "$log" 2>&1; else "$@"; fi; }
    printf "\n== %s\n" "$command"
    logged eval "$command" || failed
    run=$(eval "$command --show-run") || failed
    [ "$run/summary.json" -nt "$run/best.pt" ] || logged $python test_3d.py --ckpt "$run/best.pt" --published || failed
    [ -z "$log" ] || rm "$log"
'
export python jobs

all() {  # all: run, or print, the cells that come in, one a line
    if [ "$dry" ]; then
        while IFS= read -r line; do
            printf '%s && python test_3d.py --ckpt "$(%s --show-run)/best.pt" --published\n' "$line" "$line"
        done
    else
        tr '\n' '\0' | xargs -0 -r -n 1 -P "$jobs" sh -c "$do_cell" cell
    fi
}

methods_on() {  # methods_on <data set>: the rows, the longest first
    if [ "$methods" ]; then echo "$methods"; return; fi
    case $1 in
        brats21) echo acf_bckd at kd ;;  # those of the paper
        *) echo cirkd acf_bckd dist ifvd dkd nkd skd at cwd kd ;;
    esac
}

teacher_cells() {
    for dataset in $datasets; do
        for network in $teachers; do cell "$dataset" supervised - "$network" "$@" $teacher_settings; done
    done
}

student_cells() {
    for dataset in $datasets; do
        for method in $(methods_on "$dataset"); do
            for taught in $students; do break; done  # the first
            [ "$method" != acf_bckd ] || taught=$students
            for teacher in $teachers; do
                for student in $taught; do cell "$dataset" "$method" "$teacher" "$student" "$@"; done
            done
        done
    done
    for dataset in $datasets; do
        for network in $students; do cell "$dataset" supervised - "$network" "$@"; done
    done
}

first=$(teacher_cells "$@") then=$(student_cells "$@") failed=
[ "$first$then" ] || { echo "error: no command matches --only '$only'" >&2; exit 1; }
if [ "$first" ] && ! printf '%s\n' "$first" | all; then
    echo "error: a teacher failed, see above" >&2
    exit 1
fi
[ -z "$then" ] || printf '%s\n' "$then" | all || failed=1
if [ -z "$dry" ]; then
    $python tools/results_table.py --layout kd
    [ -z "$failed" ] || { echo "error: some cells failed, see above" >&2; exit 1; }
fi
