#!/bin/sh
# The commands behind the tables of CRKD: on ACDC (3, 7 patients) and LA (4, 8 scans) every method and both bounds, the
# labelled cases alone and all labels; on ISIC-2018 and Kvasir-SEG (5, 10, 20 %) the 2D methods.
#
#   sh scripts/table_ssl.sh --dry-run                         # print the commands
#   sh scripts/table_ssl.sh --only 'acdc.* (crkd|unimatch) '  # run some: extended grep on the training command
#   sh scripts/table_ssl.sh --seeds "0 1 2" --preset as_released -- workers=8 device=cuda
#
# What follows -- are KEY=VALUE settings for every training call. What is complete is not done again; an interrupted
# training goes on where it stopped. Every run is scored by both protocols. Results: tools/results_table.py --layout ssl
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

cell() {  # cell <2d or 3d> <data set> <labelled> <method> <settings>: train and test every seed, or print how
    kind=$1 dataset=$2 labelled=$3 method=$4
    shift 4
    [ "$method" = supervised ] || [ "$preset" = clean ] || set -- "preset=$preset" "$@"
    [ $# -eq 0 ] || set -- --opts "$@"
    for seed in $seeds; do
        one_run "$@"
    done
}

one_run() {  # one_run [--opts <settings>]: of the cell and seed at hand
    set -- --labelled "$labelled" --method "$method" --seed "$seed" --resume "$@"
    set -- $python "train_${kind}_crkd.py" --config "configs/$dataset.yaml" "$@"
    command=$(quoted "$@")
    printf '%s\n' "$command" | grep -Eq -e "$only" || return 0
    found=1
    if [ -n "$dry" ]; then
        test="python test_$kind.py --ckpt \"\$($command --show-run)/best.pt\""
        printf '%s\n%s\n%s --protocol published\n' "$command" "$test" "$test"
        return 0
    fi
    printf '\n== %s\n' "$command"
    "$@"
    run=$("$@" --show-run)
    [ "$run/summary.json" -nt "$run/best.pt" ] || $python "test_$kind.py" --ckpt "$run/best.pt"
    [ "$run/summary_published.json" -nt "$run/best.pt" ] ||
        $python "test_$kind.py" --ckpt "$run/best.pt" --protocol published
}

for labelled in 3 7; do
    for method in supervised unimatch crossmatch acmt crkd; do cell 2d acdc "$labelled" "$method" "$@"; done
done
cell 2d acdc all supervised "$@"
for labelled in 4 8; do
    for method in supervised unimatch crossmatch lefed acmt mlrpl crkd; do cell 3d la "$labelled" "$method" "$@"; done
done
cell 3d la all supervised "$@"
for dataset in isic2018 kvasir; do
    for labelled in 0.05 0.1 0.2; do
        for method in supervised unimatch crossmatch acmt crkd; do cell 2d "$dataset" "$labelled" "$method" "$@"; done
    done
    cell 2d "$dataset" all supervised "$@"
done
[ -n "$found" ] || { echo "error: no command matches --only '$only'" >&2; exit 1; }
[ -n "$dry" ] || $python tools/results_table.py --layout ssl
