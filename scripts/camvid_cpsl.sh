#!/bin/sh
# The comparison of docs/results: CamVid by day → dusk, with and without BLV side by side, one thread a run, two seeds.
# A stopped run goes on where it was. Runs of seed N lie in uda/runs/camvid_seed_N.
set -eu
cd "$(dirname "$0")/../uda"
export OMP_NUM_THREADS=1
task=camvid_day_to_dusk
run() { # stage, name, variant ("" or blv), further settings
    config=configs/$task/$1${3:+_$3}.yaml name=$2${3:+_$3}
    shift 3
    python -m common.steps checkpoints python train.py "$config" "name=$name" --resume $OVERRIDES "$@"
}
compare() {
    run warm_up source_only "$1" method.adversarial=0
    sh main.sh $task $1
    run stage1 self_training "$1" method.rectify=false method.self_label=0 method.consistency=0
}
python ../scripts/shrink_dataset.py camvid --out datasets/camvid_half
for seed in 0 1; do
    export OVERRIDES="seed=$seed train.threads=1 output=runs/camvid_seed_$seed"
    compare "" &
    first=$!
    compare blv
    wait "$first"
done
