#!/bin/sh
# The few-label tables of RESULTS.md: parts of ACDC and LA in trainings of minutes that a laptop can do.
#
#   sh scripts/table_small.sh                                         # all cells, two at a time
#   sh scripts/table_small.sh --dry-run                               # print the commands
#   PARTS="acdc la" METHODS="supervised crkd" SEEDS=0 sh scripts/table_small.sh
#
# PARTS: acdc, la (every method), rates (the learning rates that were tried on ACDC beside the chosen ones), ablation
# (CRKD's parts and open decisions on ACDC, seed 0), presets (as_released where it differs, seed 0, and CrossMatch on LA
# with nothing but the threshold of that form). Not by default, since it wants a GPU: la_medium (every method on larger
# patches of LA, and MLRPL as_released).
# SEEDS (0 and 1) are those of SEEDED ("supervised unimatch crkd"), the other methods have seed 0. JOBS: trainings at
# a time, of one thread each. What is complete is not repeated; an interrupted training goes on where it stopped.
# Then: tools/evidence.py collect, tables.
set -e
case $1 in
    --dry-run) dry=1 ;;
    '') dry= ; . "$(dirname "$0")/setup.sh" ;;
    *) echo "error: unknown argument $1; known: --dry-run" >&2; exit 2 ;;
esac
rate= jobs=${JOBS:-2} seeds=${SEEDS:-0 1} seeded=${SEEDED:-supervised unimatch crkd}
# What one cell does: train and test, unless that is done. The first word is 2d or 3d.
do_cell='
    log=$(mktemp)
    kind=$1
    shift
    run=$($python train_${kind}_crkd.py "$@" --show-run) || exit 1
    printf "== %s\n" "$run"
    $python train_${kind}_crkd.py --resume "$@" > "$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
    [ "$run/summary.json" -nt "$run/best.pt" ] ||
        $python test_$kind.py --ckpt "$run/best.pt" --split val --no-predictions > "$log" 2>&1 ||
        { tail -n 20 "$log"; exit 1; }
    rm "$log"
'
export python do_cell OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

all() {  # all: run the cells that come in, one a line, if any
    if [ "$dry" ]; then
        sed 's|^\(..\) |python train_\1_crkd.py |'
    else
        xargs -r -P "$jobs" -L 1 sh -c "$do_cell" cell
    fi
}

part() { case " ${PARTS:-acdc rates la ablation presets} " in *" $1 "*) ;; *) return 1 ;; esac; }
chosen() { case " ${METHODS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }

rates() {  # rates <data set> <method>: the chosen learning rate, then the others that were tried
    case $1:$2 in
        la_medium:* | acdc_small:crossmatch | acdc_small:acmt) echo 0.01 ;;  # no other was tried
        acdc_small:unimatch) echo 0.01 0.05 ;;
        acdc_small:*) echo 0.05 0.01 ;;
        *) echo 0.05 ;;  # not tried
    esac
}

cell() {  # cell <2d or 3d> <data set> <labelled> <method> <seed> [<tag> [<further settings>]]; rate: another
    printf '%s --config configs/%s.yaml --labelled %s --method %s --seed %s' "$1" "$2" "$3" "$4" "$5"
    of=$(rates "$2" "$4")
    lr=${rate:-${of%% *}} name=$6
    if [ $# -gt 6 ]; then shift 6; else set --; fi
    if [ "$lr" != 0.01 ]; then  # that is the configuration's
        set -- "lr=$lr" "$@"
        name=lr$lr${name:+-$name}
    fi
    [ -z "$name$*" ] || printf ' --opts'
    [ -z "$name" ] || printf ' tag=%s' "$name"
    [ $# -eq 0 ] || printf ' "%s"' "$@"
    printf '\n'
}

table() {  # table <2d or 3d> <data set> <labelled> <methods>: all seeds of the methods that have several
    for seed in $seeds; do
        for method in $4; do
            chosen "$method" || continue
            case " $seeded " in *" $method "*) ;; *) [ "$seed" = 0 ] || continue ;; esac
            cell "$1" "$2" "$3" "$method" "$seed"
        done
    done
}

trial() {  # trial <name> <arguments of CRKD>
    cell 2d acdc_small 3 crkd 0 "$1" "method_args={crkd: {threshold: 0.8, $2}}"
}

{
    if part acdc; then table 2d acdc_small 3 "crkd unimatch supervised crossmatch acmt"; fi
    if part la; then table 3d la_small 4 "crkd unimatch supervised acmt mlrpl crossmatch lefed"; fi
    if part la_medium; then
        table 3d la_medium 4 "lefed crossmatch crkd unimatch mlrpl acmt supervised"
        if chosen mlrpl; then cell 3d la_medium 4 mlrpl 0 "" preset=as_released; fi
    fi
    if part rates; then
        for method in crkd unimatch supervised crossmatch acmt; do
            chosen "$method" || continue
            of=$(rates acdc_small "$method")
            case $of in *" "*) for rate in ${of#* }; do cell 2d acdc_small 3 "$method" 0; done ;; esac
        done
        rate=
    fi
    if part ablation; then
        trial no_lec "lec: 0.0"
        trial no_csd "csd: 0.0"
        trial no_ckd "ckd_pixel: 0.0, ckd_feature: 0.0"
        trial no_lec_csd_ckd "consistency: 0.0"
        trial no_pseudo_loss "pseudo_weight: 0.0"
        trial consistency_1 "consistency: 1.0"
        trial cross_entropy "pseudo_loss: ce"
        trial present_classes "dice_absent: false"
        trial tau_1 "csd_tau: 1.0"
        trial projected "feature_space: projected"
        trial joint "pseudo_mode: joint"
    fi
    if part presets; then
        for method in crkd unimatch acmt; do cell 2d acdc_small 3 "$method" 0 "" preset=as_released; done
        for method in mlrpl crossmatch crkd unimatch acmt; do cell 3d la_small 4 "$method" 0 "" preset=as_released; done
        # What the released arithmetic has for a threshold in these 600 steps, in the clean form.
        cell 3d la_small 4 crossmatch 0 threshold0.52 "method_args={crossmatch: {threshold: 0.52}}"
    fi
    if part acdc; then table 2d acdc_small 7 "crkd unimatch supervised crossmatch acmt"; fi
} | all
