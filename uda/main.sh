#!/bin/sh
# The whole pipeline of a task: sh main.sh gta5_to_cityscapes [blv]
# Also synthia_to_cityscapes, camvid_day_to_dusk, toy. A stopped run goes on where it was; finished steps are skipped.
# $TRAIN starts a training, e.g. TRAIN="torchrun --nproc-per-node 4 -m uda.train"; further settings come from $OVERRIDES.
set -eu
cd "$(dirname "$0")"
if [ $# -lt 1 ] || [ ! -d "configs/$1" ]; then
    echo "error: usage: sh main.sh TASK [VARIANT]; tasks: $(ls configs | tr '\n' ' ')" >&2
    exit 2
fi
task=$1
variant=${2:-}
end=${variant:+_$variant}
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
        mkdir -p "$(dirname "$mark")" && : >"$mark"
    fi
}
stage() { step "$runs/$1$end/done" $train "configs/$task" --stage "$1" ${variant:+--variant "$variant"} --resume ${OVERRIDES:-}; }
tool() {
    program=$1 name=$2
    shift 2
    step "$runs/$name$end/done_${program}" python "$program.py" "configs/$task" --stage "$name" \
        ${variant:+--variant "$variant"} "$@" ${OVERRIDES:-}
}

if [ "$task" = toy ]; then
    step datasets/toy_gta5/toy.json python ../scripts/make_toy.py gta5 --root datasets/toy_gta5 --train 96 --val 0 --domain render
    step datasets/toy_cityscapes/toy.json python ../scripts/make_toy.py cityscapes --root datasets/toy_cityscapes --train 96 --val 32
fi
if [ "$task" = camvid_day_to_dusk ]; then
    step datasets/camvid_half/done python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
fi
stage warm_up
tool generate_pseudo_label warm_up --soft
tool calc_prototype warm_up
tool generate_class_distribution warm_up
stage stage1
tool generate_pseudo_label stage1
stage stage2
tool generate_pseudo_label stage2
stage stage3
python test.py "configs/$task" --stage stage3 ${variant:+--variant "$variant"} ${OVERRIDES:-} --history
