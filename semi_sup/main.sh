#!/bin/sh
# The whole pipeline of a split: sh main.sh voc_1over32 [usrn | usrn_blv | selftrain | selftrain_blv | baseline]
# or of a folder of your own, wherever it lies: sh main.sh PATH [VARIANT], with the configs PATH/baseline.yaml and
# PATH/VARIANT.yaml (or .json; docs/own_data.md); relative paths in them count from where you start it.
# baseline -> features -> clustering -> training -> test. Stops at the first error; a stopped run resumes where it was; a
# finished step is skipped unless it would read something else now (common/steps.py: what then, and what CHANGED=keep
# and CHANGED=anew do). Settings from the environment: $OVERRIDES (section.key=value ..., for every step, e.g. seed=1
# output=saved/seed_1; $SAVED is short for that output), $ALGORITHM (balanced_kmeans or normal_kmeans), $TRAIN (e.g.
# TRAIN="torchrun --nproc-per-node 2 main.py"; with a folder of your own "... -m semi_sup.main").
set -eu
trap 'exit 143' TERM # the shell ends after the step that is running, which saves when it gets the signal too
home=$(cd "$(dirname "$0")" && pwd)
split=${1:-}
variant=${2:-usrn}

config() { # a config's file, whichever format it has
    for file in "$1.json" "$1.yaml"; do
        if [ -f "$file" ]; then break; fi
    done
    echo "$file"
}
if [ -d "$split" ]; then # a folder of one's own
    export PYTHONSAFEPATH=1 # whatever lies in the working directory hides no module
    scripts=$home/../scripts
    main="python -m semi_sup.main"
    clustering="python -m semi_sup.clustering"
    base=$(config "${split%/}/baseline")
    run=$(config "${split%/}/$variant")
else
    cd "$home"
    scripts=../scripts
    main="python main.py"
    clustering="python clustering.py"
    base=configs/${split}_baseline.json
    run=configs/${split}_$variant.json
fi
if [ ! -f "$run" ]; then
    echo "error: usage: sh main.sh SPLIT|FOLDER [VARIANT] (there is no $run); configs:" \
        $(cd "$home/configs" && ls *.json small/*.json | sed 's/\.json$//') >&2
    exit 2
fi
case " ${OVERRIDES:-}" in *" name="*)
    echo "error: OVERRIDES: name= would put all steps into one folder; give output=DIR, or runs.STEP=NAME for one step" >&2
    exit 2
    ;;
esac
algorithm=${ALGORITHM:-balanced_kmeans}
settings="${SAVED:+output=$SAVED} ${OVERRIDES:-}"
labels=

stem() { # of a config, which its run is named after
    basename "${1%.*}"
}
step() { # what it makes in the run's folder, command
    python -m common.steps "$@" $settings
}

case $run in configs/toy_1over8_* | configs/small/toy*)
    python ../scripts/make_toy.py voc --root datasets/toy_voc --train 160 --val 24
    ;;
esac
python "$scripts/prepare_splits.py" "$run" $settings
case $variant in usrn*)
    step checkpoints ${TRAIN:-$main} --config "$base" --resume
    step features $main --config "$base" --save_feature
    step "label_subcls_$algorithm" $clustering --config "$base" --clustering_algorithm "$algorithm"
    if [ "$algorithm" != balanced_kmeans ]; then
        labels="name=$(stem "$run")_$algorithm data.streams.labeled.maps.sub_label=run:$(stem "$base")/label_subcls_$algorithm"
    fi
    ;;
esac
step checkpoints ${TRAIN:-$main} --config "$run" --resume $labels
step report.html $main --config "$run" --test $labels
