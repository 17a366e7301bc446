#!/bin/sh
# The whole pipeline of a task: sh main.sh gta5_to_cityscapes [blv | proda]
# Also synthia_to_cityscapes, camvid_day_to_dusk, toy. A stopped run goes on where it was; finished steps are skipped.
# $TRAIN starts a training, e.g. TRAIN="torchrun --nproc-per-node 4 -m uda.train"; further settings come from $OVERRIDES.
set -eu
cd "$(dirname "$0")"
task=${1:-}
variant=${2:-}
if [ -z "$task" ] || [ ! -f "configs/$task/stage1${variant:+_$variant}.yaml" ]; then
    echo "error: usage: sh main.sh TASK [VARIANT]; configs of the first stage:" \
        $(cd configs && ls */stage1*.yaml | sed 's/\.yaml$//') >&2
    exit 2
fi
runs=runs/$task
train=${TRAIN:-python train.py}

# A step leaves a mark when it has ended well, and is skipped from then on.
step() {
    mark=$1
    shift
    if [ -e "$mark" ]; then
        echo "[$task] $mark: done already"
    else
        echo "[$task] $*"
        "$@"
        mkdir -p "$(dirname "$mark")"
        [ -e "$mark" ] || : >"$mark"
    fi
}
# A stage that the variant has no config of is the plain one (the warm-up of proda).
choose() {
    run=$1 words="configs/$task --stage $1"
    if [ -n "$variant" ] && [ -f "configs/$task/$1_$variant.yaml" ]; then
        run=$1_$variant words="$words --variant $variant"
    fi
}
stage() {
    choose "$1"
    step "$runs/$run/done" $train $words --resume ${OVERRIDES:-}
}
tool() {
    program=$1
    choose "$2"
    shift 2
    step "$runs/$run/done_$program" python "$program.py" $words "$@" ${OVERRIDES:-}
}

if [ "$task" = toy ]; then
    step datasets/toy_gta5/toy.json python ../scripts/make_toy.py gta5 --root datasets/toy_gta5 --train 96 --val 0 --domain render
    step datasets/toy_cityscapes/toy.json python ../scripts/make_toy.py cityscapes --root datasets/toy_cityscapes --train 96 --val 32
fi
if [ "$task" = camvid_day_to_dusk ]; then
    step datasets/camvid_half/done python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
fi
choose stage2 # its initial weights are the one file that no step makes
[ -e "$runs/$run/done" ] || python train.py $words --check ${OVERRIDES:-}
stage warm_up
tool generate_pseudo_label warm_up --soft
tool calc_prototype warm_up
tool generate_class_distribution warm_up
stage stage1
tool generate_pseudo_label stage1
stage stage2
tool generate_pseudo_label stage2
stage stage3
tool test stage3
python test.py $words --history ${OVERRIDES:-}
