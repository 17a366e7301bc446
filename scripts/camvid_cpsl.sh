#!/bin/sh
# The comparison of docs/results: CamVid by day → dusk, with and without BLV side by side, one thread a run, two seeds.
# A stopped run goes on where it was. Runs of seed N end up in uda/runs/camvid_seed_N.
set -eu
cd "$(dirname "$0")/../uda"
export OMP_NUM_THREADS=1
task=camvid_day_to_dusk
run() { # stage, name, variant ("" or blv), further settings
    stage=$1 name=$2${3:+_$3} variant=${3:+--variant $3}
    shift 3
    [ -e "runs/$task/$name/done" ] && return
    python train.py configs/$task --stage "$stage" $variant "name=$name" --resume $OVERRIDES "$@" && : >"runs/$task/$name/done"
}
compare() {
    run warm_up source_only "$1" method.adversarial=0
    sh main.sh $task $1
    run stage1 self_training "$1" method.rectify=false method.self_label=0 method.consistency=0
}
python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
for seed in 0 1; do
    [ -e runs/camvid_seed_$seed ] && continue
    export OVERRIDES="seed=$seed train.threads=1"
    compare "" &
    first=$!
    compare blv
    wait "$first"
    mv runs/$task runs/camvid_seed_$seed
done
