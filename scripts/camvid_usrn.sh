#!/bin/sh
# The comparison of docs/results: CamVid with 46 of 367 images labelled, two seeds at once, one thread a run.
set -eu
cd "$(dirname "$0")/../semi_sup"
export OMP_NUM_THREADS=1
compare() {
    for variant in usrn selftrain usrn_blv; do
        OVERRIDES="output=saved/seed_$1 seed=$1 train.threads=1" sh main.sh camvid_1over8 "$variant"
    done
}
compare 0 &
first=$!
compare 1
wait "$first"
