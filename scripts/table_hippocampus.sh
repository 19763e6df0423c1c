#!/bin/sh
# The tables of MSD Hippocampus (real MRI) in RESULTS.md: trainings of minutes that a laptop can do. Two cores: a night.
#
#   sh scripts/table_hippocampus.sh                                   # all cells, two at a time
#   sh scripts/table_hippocampus.sh --dry-run                         # print the commands
#   PARTS=methods TEACHERS=resunet METHODS="kd acf_bckd" SEEDS="0 1" sh scripts/table_hippocampus.sh
#
# PARTS: teachers (ResU-Net, SegResNet), alone (every student without a teacher), methods (U-Net under each method and
# teacher), rates (the learning rates that were tried beside the chosen ones), ablation (parts of ACF-BCKD under the
# ResU-Net, single ones, all but SBD and a tenth of SBD with ESPNetV2; the weaker ACF-BCKD under TEACHERS), presets
# (as_released where it differs, under one teacher each), students (the other students under METHODS_OF_STUDENTS:
# acf_bckd kd at dist). SEEDS are those of the U-Net in methods and, beside seed 0, in alone, and of the weaker
# ACF-BCKD; ESPNetV2 has seeds 0 and 1 alone and under ACF-BCKD of the ResU-Net; all else has seed 0. WIDTH: of the
# U-Net's first level. WARMUP: steps in which a method's terms grow to their weights, half of STEPS; 0: none. METHOD_LR:
# rate of what ACF-BCKD and CIRKD learn themselves, 0.01; 0: that of the student. LR: one rate for all, not the one that
# validation chose for each method with seed 0 and the ResU-Net. JOBS: trainings at a time, of one thread each. Every
# training has the same steps, schedule, batch and augmentation. What is complete is not repeated; an interrupted
# training goes on where it stopped. Run folders do not tell values of WARMUP or METHOD_LR apart other than 0: move them
# away before trying a second one. Then: tools/evidence.py collect, tables.
set -e
case $1 in
    --dry-run) dry=1 ;;
    '') dry= ; . "$(dirname "$0")/setup.sh" ;;
    *) echo "error: unknown argument $1; known: --dry-run" >&2; exit 2 ;;
esac
config=configs/hippocampus.yaml
steps=${STEPS:-600} jobs=${JOBS:-2} teachers=${TEACHERS:-resunet segresnet} seeds=${SEEDS:-0 1 2}
teacher_steps=${TEACHER_STEPS:-$((2 * steps))}
rate= width=${WIDTH:-4} warmup=${WARMUP:-$((steps / 2))} own=${METHOD_LR:-0.01}
methods=${METHODS:-acf_bckd kd dist cwd at nkd skd ifvd dkd cirkd}

rates() {  # rates <method> <student>: the chosen learning rate, then the others that were tried
    case $1:$2 in
        *:espnetv2 | *:mobile_unet | *:lcovnet) echo 0.1 ;;  # at 0.4 Mobile U-Net diverges
        supervised:*) echo 0.4 0.2 0.1 ;;
        cwd:*) echo 0.2 0.4 0.05 ;;
        dist:*) echo 0.1 0.2 ;;
        acf_bckd:* | skd:*) echo 0.2 0.4 ;;
        *) echo 0.4 0.2 ;;
    esac
}

# What one cell does: train and test, unless that is done.
do_cell='
    log=$(mktemp)
    run=$($python train_3d_distill.py --config $config "$@" --show-run) || exit 1
    printf "== %s\n" "$run"
    $python train_3d_distill.py --config $config --resume "$@" > "$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
    [ "$run/summary.json" -nt "$run/best.pt" ] ||
        $python test_3d.py --ckpt "$run/best.pt" --no-predictions > "$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
    rm "$log"
'
export python config do_cell OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

all() {  # all: run the cells that come in, one a line, if any
    if [ "$dry" ]; then
        sed 's|^|python train_3d_distill.py --config configs/hippocampus.yaml |'
    else
        xargs -r -P "$jobs" -L 1 sh -c "$do_cell" cell
    fi
}

student() {  # student <network> <seed> <method> <teacher, or - for none> [<tag> [<further settings>]]; rate: another
    network=$1 seed=$2 method=$3 teacher=$4
    chosen=$(rates "$method" "$network")
    lr=${rate:-${LR:-${chosen%% *}}}
    flags="--method $method --student $network --seed $seed"
    name=s$steps more=
    if [ "$network" = unet ]; then
        name=$name-w$width
        more=" \"network_args={unet: {channels: [$width, $((2 * width)), $((4 * width)), $((8 * width))]}}\""
    fi
    name=$name-lr$lr
    if [ "$own" != 0 ]; then
        case $method in acf_bckd | cirkd) more="$more method_lr=$own" name=$name-own ;; esac
    fi
    if [ "$teacher" != - ] && [ "$warmup" != 0 ]; then more="$more distill_warmup=$warmup" name=$name-warmup; fi
    case $method:$lr:$network-$teacher in
        kd:*) ;;
        cwd:0.[2-9]*:* | *:0.1:mobile_unet-segresnet) more="$more grad_clip=1.0" name=$name-clip ;;  # diverge without
    esac
    settings="workers=0 lr=$lr max_steps=$steps val_interval=$((steps / 4)) tag=$name${5:+-$5}$more"
    [ "$network" != mobile_unet ] || settings="$settings patch_size=[64,64,64]"  # multiples of 32
    if [ "$teacher" != - ]; then
        flags="$flags --teacher $teacher"
        settings="$settings teacher_checkpoint=runs/hippocampus/supervised/$teacher/seed0-s$teacher_steps/best.pt"
    fi
    shift 4
    [ $# -eq 0 ] || shift
    printf '%s' "$flags --opts $settings"
    [ $# -eq 0 ] || printf ' "%s"' "$@"
    printf '\n'
}

seeds_of() {  # seeds_of <method> <student other than the U-Net> [<teacher>]
    case $1-$2-$3 in supervised-espnetv2- | acf_bckd-espnetv2-resunet) echo 0 1 ;; *) echo 0 ;; esac
}

part() { case " ${PARTS:-teachers alone methods rates ablation presets students} " in *" $1 "*) ;; *) return 1 ;; esac; }

{   # Teachers come first: the others read them. They take twice the steps, or TEACHER_STEPS.
    if part teachers; then
        for teacher in $teachers; do
            settings="workers=0 lr=0.05 grad_clip=1.0 max_steps=$teacher_steps val_interval=$((teacher_steps / 4))"
            settings="$settings tag=s$teacher_steps"
            echo "--method supervised --student $teacher --seed 0 --opts $settings"
        done
    fi
} | all
{
    if part alone; then
        student unet 0 supervised -
        for network in espnetv2 mobile_unet lcovnet; do
            for seed in $(seeds_of supervised $network); do student $network "$seed" supervised -; done
        done
    fi
    for seed in $seeds; do
        if part alone && [ "$seed" != 0 ]; then student unet "$seed" supervised -; fi
        for teacher in $teachers; do
            for method in $methods; do
                if part methods; then student unet "$seed" "$method" "$teacher"; fi
            done
        done
    done
    if part rates && [ -z "$LR" ]; then
        for method in ${METHODS:-supervised $methods}; do
            of=$(rates "$method" unet) teacher=resunet
            [ "$method" != supervised ] || teacher=-
            for rate in ${of#* }; do student unet 0 "$method" $teacher; done
        done
        rate=
    fi
    if part ablation; then
        for kept in "afd" "cfd" "hbd" "sbd" "afd cfd" "hbd sbd" "cfd hbd sbd" "afd hbd sbd" "afd cfd sbd" "afd cfd hbd"; do
            left_out=
            for term in afd cfd hbd sbd; do
                case " $kept " in *" $term "*) ;; *) left_out="$left_out, $term: 0.0" ;; esac
            done
            tag=$(echo "$kept" | tr ' ' '+') parts="method_args={acf_bckd: {${left_out#, }}}"
            student unet 0 acf_bckd resunet "$tag" "$parts"
            # ESPNetV2, which the method holds back, with one term at a time and without the one that does it
            case $kept in "afd cfd hbd") ;; *" "*) continue ;; esac
            for seed in $(seeds_of acf_bckd espnetv2 resunet); do
                student espnetv2 "$seed" acf_bckd resunet "$tag" "$parts"
            done
        done
        # AFD and CFD are means over voxels: on this grid of 24x32x24 the paper's weights are six times as strong as on
        # 48x48x48.
        scale="feature_reduction: sum, afd: 0.226, cfd: 0.226"
        for seed in $seeds; do
            for teacher in $teachers; do student unet "$seed" acf_bckd $teacher sum "method_args={acf_bckd: {$scale}}"; done
        done
        for seed in $(seeds_of acf_bckd espnetv2 resunet); do
            student espnetv2 "$seed" acf_bckd resunet sum "method_args={acf_bckd: {$scale}}"
            student espnetv2 "$seed" acf_bckd resunet sbd0.1 "method_args={acf_bckd: {sbd: 0.1}}"
        done
    fi
    if part presets; then
        for method in kd skd ifvd cirkd; do student unet 0 "$method" resunet "" preset=as_released; done
        student unet 0 acf_bckd segresnet "" preset=as_released
    fi
    if part students; then
        for network in espnetv2 mobile_unet lcovnet; do
            for teacher in $teachers; do
                for method in ${METHODS_OF_STUDENTS:-acf_bckd kd at dist}; do
                    for seed in $(seeds_of "$method" $network "$teacher"); do
                        student $network "$seed" "$method" "$teacher"
                    done
                done
            done
        done
    fi
} | all
