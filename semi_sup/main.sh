#!/bin/sh
# The whole pipeline of a split: sh main.sh voc_1over32 [usrn | usrn_blv | selftrain | selftrain_blv | baseline]
# baseline -> features -> clustering -> training -> test. Stops at the first error; a stopped run resumes where it was; a
# finished step is skipped unless it would read something else now (common/steps.py: what then, and what CHANGED=keep
# and CHANGED=anew do). Settings from the environment: $OVERRIDES (section.key=value ..., for every step, e.g. seed=1
# output=saved/seed_1; $SAVED is short for that output), $ALGORITHM (balanced_kmeans or normal_kmeans), $TRAIN (e.g.
# TRAIN="torchrun --nproc-per-node 2 main.py").
set -eu
trap 'exit 143' TERM # the shell ends after the step that is running, which saves when it gets the signal too
cd "$(dirname "$0")"
if [ $# -lt 1 ] || [ ! -f "configs/${1}_${2:-usrn}.json" ]; then
    echo "error: usage: sh main.sh SPLIT [VARIANT]; configs:" $(cd configs && ls *.json small/*.json | sed 's/\.json$//') >&2
    exit 2
fi
case " ${OVERRIDES:-}" in *" name="*)
    echo "error: OVERRIDES: name= would put all steps into one folder; give output=DIR, or runs.STEP=NAME for one step" >&2
    exit 2
    ;;
esac
split=$1
variant=${2:-usrn}
algorithm=${ALGORITHM:-balanced_kmeans}
base=${split}_baseline
run=${split}_$variant
name=$(basename "$run") # of a run, without the folder of its config
settings="${SAVED:+output=$SAVED} ${OVERRIDES:-}"
labels=

step() { # what it makes in the run's folder, command
    python -m common.steps "$@" $settings
}

case $split in toy_1over8 | small/toy*)
    python ../scripts/make_toy.py voc --root datasets/toy_voc --train 160 --val 24
    ;;
esac
python ../scripts/prepare_splits.py "configs/$run.json" $settings
case $variant in usrn*)
    step checkpoints ${TRAIN:-python main.py} --config "configs/$base.json" --resume
    step features python main.py --config "configs/$base.json" --save_feature
    step "label_subcls_$algorithm" python clustering.py --config "configs/$base.json" --clustering_algorithm "$algorithm"
    if [ "$algorithm" != balanced_kmeans ]; then
        labels="name=${name}_$algorithm data.streams.labeled.maps.sub_label=run:$(basename "$base")/label_subcls_$algorithm"
    fi
    ;;
esac
step checkpoints ${TRAIN:-python main.py} --config "configs/$run.json" --resume $labels
step report.html python main.py --config "configs/$run.json" --test $labels
