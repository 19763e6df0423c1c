#!/bin/sh
# CRKD with one decision changed at a time, beside the labels alone: trains every trial, prints validation Dice and the
# state of the pseudo-labels over time. 2D or 3D, by the configuration. What is complete is not done again.
#
#   sh scripts/ablation_crkd.sh configs/demo_acdc.yaml
#   sh scripts/ablation_crkd.sh configs/acdc.yaml "patch_size=[96,96]" labelled_batch=6 unlabelled_batch=6 \
#       max_steps=600 val_interval=150 workers=0           # a short form, for a CPU
#   ONLY='default|joint' SEED=1 sh scripts/ablation_crkd.sh configs/acdc.yaml
#
# Arguments after the configuration are KEY=VALUE settings for every training call.
set -e
. "$(dirname "$0")/setup.sh"
config=${1:?name a configuration, for example configs/acdc.yaml}
shift
script=train_2d_crkd.py
grep -q '^format: la' "$config" && script=train_3d_crkd.py
seed=${SEED:-0} runs=

trial() {  # trial <name> <method> <method arguments of CRKD> [<settings>]
    printf '%s' "$1" | grep -Eqx "${ONLY:-.*}" || return 0
    name=$1 method=$2 arguments=$3 setting=$4
    shift 4
    set -- --config "$config" --method "$method" --seed "$seed" --opts "$@" ${setting:+"$setting"} "tag=ablation-$name" \
        ${arguments:+"method_args={crkd: {$arguments}}"}
    $python $script --resume "$@"
    runs="$runs${runs:+
}$($python $script --show-run "$@")"
}

threshold="threshold: $(sed -n 's/.*threshold: *\([0-9.]*\).*/\1/p' "$config" | head -1)"
trial labels_only supervised "" "" "$@"
trial default crkd "$threshold" "" "$@"
trial no_pseudo_loss crkd "$threshold, pseudo_weight: 0.0" "" "$@"                        # D1: w_u = 0
trial pseudo_weight_1 crkd "$threshold, pseudo_weight: 1.0" "" "$@"                       # D1: w_u = 1
trial no_lec_csd_ckd crkd "$threshold, consistency: 0.0" "" "$@"                          # D1: w_max = 0
trial consistency_1 crkd "$threshold, consistency: 1.0" "" "$@"                           # D1: w_max = 1
trial no_lec crkd "$threshold, lec: 0.0" "" "$@"
trial no_csd crkd "$threshold, csd: 0.0" "" "$@"
trial no_ckd crkd "$threshold, ckd_pixel: 0.0, ckd_feature: 0.0" "" "$@"
trial no_pseudo_ramp crkd "$threshold, pseudo_ramp: 0.0" "" "$@"                          # D1, D3
trial cross_entropy crkd "$threshold, pseudo_loss: ce" "" "$@"                            # D2
trial dice crkd "$threshold, pseudo_loss: dice, dice_background: true, dice_average: true" "" "$@"  # D2: UniMatch's
trial present_classes crkd "$threshold, dice_absent: false" "" "$@"                       # D2
trial ema crkd "$threshold, ema_decay: 0.99" "" "$@"                                      # D4
trial joint crkd "$threshold, pseudo_mode: joint" "" "$@"                                 # D5
trial eval crkd "$threshold, pseudo_mode: eval" "" "$@"                                   # D5
trial all_statistics crkd "$threshold, statistics: all" "" "$@"
trial first_form crkd "$threshold, pseudo_mode: eval, statistics: all, pseudo_ramp: 0.0" "" "$@"
trial unmixed_fp crkd "$threshold, fp_input: weak" "" "$@"                                # D6
trial tau_1 crkd "$threshold, csd_tau: 1.0" "" "$@"                                       # D7
trial projected crkd "$threshold, feature_space: projected" "" "$@"                       # D9
trial warmup crkd "$threshold, warmup: 0.2" "" "$@"
trial constant_lr crkd "$threshold" schedule=constant "$@"
[ -n "$runs" ] || { echo "error: no trial matches ONLY='$ONLY'" >&2; exit 1; }
printf '\n== results, in %%\n'
# one folder a line, whatever its name is
set -f
IFS='
'
# shellcheck disable=SC2086
$python tools/log_table.py $runs --keys val/dice train/mask_ratio train/pseudo_accuracy train/pseudo_foreground
