#!/bin/sh
# The whole pipeline of a split: sh main.sh voc_1over32 [usrn | usrn_blv | selftrain | selftrain_blv | baseline]
# baseline -> features -> clustering -> training -> test. Stops at the first error; a stopped run goes on where it was,
# and finished steps are skipped. Settings from the environment: $OVERRIDES (section.key=value ..., for every step),
# $ALGORITHM (balanced_kmeans or normal_kmeans), $TRAIN (e.g. TRAIN="torchrun --nproc-per-node 2 main.py"), $SAVED (the
# folder of all runs, e.g. one a seed: SAVED=saved/seed_1 OVERRIDES=seed=1).
set -eu
cd "$(dirname "$0")"
if [ $# -lt 1 ] || [ ! -f "configs/${1}_${2:-usrn}.json" ]; then
    echo "error: usage: sh main.sh SPLIT [VARIANT]; configs:" $(cd configs && ls *.json | sed 's/\.json$//') >&2
    exit 2
fi
name=$1
variant=${2:-usrn}
algorithm=${ALGORITHM:-balanced_kmeans}
train=${TRAIN:-python main.py}
base=${name}_baseline
run=${name}_$variant
saved=${SAVED:-saved}
more="output=$saved ${OVERRIDES:-}"

# A step leaves a mark when it has ended well, and is skipped from then on.
step() {
    mark=$1
    shift
    if [ -e "$mark" ]; then
        echo "[$name] $mark: done already"
    else
        echo "[$name] $*"
        "$@"
        mkdir -p "$(dirname "$mark")" && touch "$mark"
    fi
}

if [ "$name" = toy_1over8 ]; then
    toy=datasets/toy_voc
    [ -e $toy/toy.json ] || rm -f "$saved"/.splits_toy*
    step $toy/toy.json python ../scripts/make_toy.py voc --root $toy --train 160 --val 24
fi
step "$saved/.splits_$run" python ../scripts/prepare_splits.py "configs/$run.json" $more
case $variant in usrn*)
    step "$saved/$base/done" $train --config "configs/$base.json" --resume $more
    step "$saved/$base/features/done" python main.py --save_feature --resume "$saved/$base/checkpoints/best" $more
    step "$saved/$base/label_subcls_$algorithm/done" \
        python clustering.py --config "configs/$base.json" --clustering_algorithm "$algorithm" $more
    [ "$algorithm" = balanced_kmeans ] || run=${run}_$algorithm
    labels="name=$run data.streams.labeled.maps.sub_label=$saved/$base/label_subcls_$algorithm"
    ;;
esac
step "$saved/$run/done" $train --config "configs/${name}_$variant.json" --resume $more ${labels:-}
step "$saved/$run/tested" python main.py --test --resume "$saved/$run/checkpoints/best" $more ${labels:-}
echo "[$name] report: semi_sup/$saved/$run/report.html"
