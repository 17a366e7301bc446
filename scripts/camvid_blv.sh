#!/bin/sh
# The comparison of docs/results/camvid_blv.md: four losses, two seeds, one thread a run, as many at once as cores.
set -eu
cd "$(dirname "$0")/.."
config=fully_sup/configs/small/upernet_r18_camvid_cpu.yaml
blv=remedies.logits.name=blv
{
    for seed in 0 1; do
        echo "name=ce_$seed seed=$seed"
        echo "name=paper_$seed seed=$seed $blv"
        echo "name=released_$seed seed=$seed $blv remedies.logits.preset=released-head remedies.logits.counts=dataset"
        echo "name=minus_$seed seed=$seed $blv remedies.logits.sign=-1"
    done
} | OMP_NUM_THREADS=1 xargs -P "$(nproc)" -I '{}' sh -c \
    "python fully_sup/train.py $config --resume output=runs/camvid_blv train.threads=1 {}"
