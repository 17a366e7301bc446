#!/bin/sh
# The comparison of docs/results: LTSS's remedies on CamVid, two seeds, one thread a run, as many at once as cores.
# A stopped run goes on where it was.
set -eu
cd "$(dirname "$0")/../ltss_benchmark"
for seed in 0 1; do
    for remedy in "" rfs- copypaste- seesaw- matcher- benchmark-; do
        echo "mask2former/${remedy}maskformer2_R18 $seed"
    done
    for remedy in "" rfs- copypaste- blv-; do
        echo "deeplabv3p/${remedy}deeplabv3p_R18 $seed"
    done
done | OMP_NUM_THREADS=1 xargs -P "$(nproc)" -n 2 sh -c 'python train_net.py --resume --config-file configs/camvid/$0.yaml \
    output=output/camvid name=$(basename $0)_$1 seed=$1 train.threads=1 '"${OVERRIDES:-}"
