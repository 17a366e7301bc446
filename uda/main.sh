#!/bin/sh
# The whole pipeline of a task: sh main.sh gta5_to_cityscapes [blv | proda]
# or of a folder of your own, wherever it lies: sh main.sh PATH [VARIANT], with the configs PATH/warm_up.yaml and
# PATH/stage{1,2,3}.yaml (docs/own_data.md); relative paths in them count from where you start it.
# Also synthia_to_cityscapes, camvid_day_to_dusk, toy, small/camvid_lite0, small/toy_lite0. A stopped run resumes where it
# was; a finished step is skipped unless it would read something else now (common/steps.py: what then, and what
# CHANGED=keep and CHANGED=anew do).
# $TRAIN starts a training, e.g. TRAIN="torchrun --nproc-per-node 4 -m uda.train"; settings of all steps come from
# $OVERRIDES, e.g. OVERRIDES="output=/data/runs seed=1".
set -eu
trap 'exit 143' TERM # the shell ends after the step that is running, which saves when it gets the signal too
home=$(cd "$(dirname "$0")" && pwd)
task=${1:-}
variant=${2:-}
if [ -d "$task" ]; then # a folder of one's own
    export PYTHONSAFEPATH=1 # whatever lies in the working directory hides no module
    folder=${task%/}
    program() { echo "python -m uda.$1"; }
else
    cd "$home"
    folder=configs/$task
    program() { echo "python $1.py"; }
fi
if [ -z "$task" ] || [ ! -f "$folder/stage1${variant:+_$variant}.yaml" ]; then
    echo "error: usage: sh main.sh TASK|FOLDER [VARIANT] (there is no $folder/stage1${variant:+_$variant}.yaml); configs of" \
        "the first stage:" $(cd "$home/configs" && ls */stage1*.yaml */*/stage1*.yaml | sed 's/\.yaml$//') >&2
    exit 2
fi
case " ${OVERRIDES:-}" in *" name="*)
    echo "error: OVERRIDES: name= would put all steps into one folder; give output=DIR, or runs.STEP=NAME for one step" >&2
    exit 2
    ;;
esac

# A stage that the variant has no config of is the plain one (the warm-up of proda).
choose() {
    config=$folder/$1${variant:+_$variant}.yaml
    [ -f "$config" ] || config=$folder/$1.yaml
}
stage() {
    choose "$1"
    python -m common.steps checkpoints ${TRAIN:-$(program train)} "$config" --resume ${OVERRIDES:-}
}
tool() { # what it makes, stage, program, its options
    makes=$1 command=$(program "$3")
    choose "$2"
    shift 3
    python -m common.steps "$makes" $command "$config" "$@" ${OVERRIDES:-}
}

case $folder in configs/toy | configs/small/toy*)
    python ../scripts/make_toy.py gta5 --root datasets/toy_gta5 --train 96 --val 0 --domain render
    python ../scripts/make_toy.py cityscapes --root datasets/toy_cityscapes --train 96 --val 32
    ;;
esac
if [ "$folder" = configs/camvid_day_to_dusk ]; then
    python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
fi
choose stage2 # its initial weights are the one file that no step makes
$(program train) "$config" --check ${OVERRIDES:-}
stage warm_up
tool pseudo_soft warm_up generate_pseudo_label --soft
tool prototypes.pt warm_up calc_prototype
tool class_distribution.npy warm_up generate_class_distribution
stage stage1
tool pseudo_hard stage1 generate_pseudo_label
stage stage2
tool pseudo_hard stage2 generate_pseudo_label
stage stage3
tool test stage3 test
$(program test) "$config" --history ${OVERRIDES:-}
