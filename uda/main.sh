#!/bin/sh
# The whole pipeline of a task: sh main.sh gta5_to_cityscapes [blv | proda]
# Also synthia_to_cityscapes, camvid_day_to_dusk, toy, small/camvid_lite0, small/toy_lite0. A stopped run resumes where it
# was; a finished step is skipped unless it would read something else now (common/steps.py: what then, and what
# CHANGED=keep and CHANGED=anew do).
# $TRAIN starts a training, e.g. TRAIN="torchrun --nproc-per-node 4 -m uda.train"; settings of all steps come from
# $OVERRIDES, e.g. OVERRIDES="output=/data/runs seed=1".
set -eu
trap 'exit 143' TERM # the shell ends after the step that is running, which saves when it gets the signal too
cd "$(dirname "$0")"
task=${1:-}
variant=${2:-}
if [ -z "$task" ] || [ ! -f "configs/$task/stage1${variant:+_$variant}.yaml" ]; then
    echo "error: usage: sh main.sh TASK [VARIANT]; configs of the first stage:" \
        $(cd configs && ls */stage1*.yaml */*/stage1*.yaml | sed 's/\.yaml$//') >&2
    exit 2
fi
case " ${OVERRIDES:-}" in *" name="*)
    echo "error: OVERRIDES: name= would put all steps into one folder; give output=DIR, or runs.STEP=NAME for one step" >&2
    exit 2
    ;;
esac

# A stage that the variant has no config of is the plain one (the warm-up of proda).
choose() {
    config=configs/$task/$1${variant:+_$variant}.yaml
    [ -f "$config" ] || config=configs/$task/$1.yaml
}
stage() {
    choose "$1"
    python -m common.steps checkpoints ${TRAIN:-python train.py} "$config" --resume ${OVERRIDES:-}
}
tool() { # what it makes, stage, program, its options
    makes=$1 program=$3
    choose "$2"
    shift 3
    python -m common.steps "$makes" python "$program" "$config" "$@" ${OVERRIDES:-}
}

case $task in toy | small/toy*)
    python ../scripts/make_toy.py gta5 --root datasets/toy_gta5 --train 96 --val 0 --domain render
    python ../scripts/make_toy.py cityscapes --root datasets/toy_cityscapes --train 96 --val 32
    ;;
esac
if [ "$task" = camvid_day_to_dusk ]; then
    python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
fi
choose stage2 # its initial weights are the one file that no step makes
python train.py "$config" --check ${OVERRIDES:-}
stage warm_up
tool pseudo_soft warm_up generate_pseudo_label.py --soft
tool prototypes.pt warm_up calc_prototype.py
tool class_distribution.npy warm_up generate_class_distribution.py
stage stage1
tool pseudo_hard stage1 generate_pseudo_label.py
stage stage2
tool pseudo_hard stage2 generate_pseudo_label.py
stage stage3
tool test stage3 test.py
python test.py "$config" --history ${OVERRIDES:-}
