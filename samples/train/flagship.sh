#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Train the flagship's transformer, all stages in turn: sh flagship.sh RUN [WEIGHTS]
#
# The same line resumes from the last checkpoint in RUN. WEIGHTS is a packed checkpoint
# (pack_checkpoint.py): where RUN holds no checkpoint, training starts at its step.
set -eu
run=$1
weights=${2:-$run/start.pt}
here=$(dirname "$0")
mkdir -p "$run"
[ -e "$weights" ] || python "$here/from_wan.py" flagship "$weights"

stage() {
    python "$here/train_dit.py" flagship "$run" --weights "$weights" --dtype float32 "$@"
}

stage --until 600 --lr 2.5e-3 --buckets 17x64x16:0.5@0.6 17x128x4:0.5@1.1
stage --until 1400 --lr 2.5e-3 --buckets 17x64x16:0.2@0.6 17x128x4:0.4@1.1 17x192x2:0.4@1.5
stage --until 2000 --lr 2e-3 --buckets 17x128x4:0.1@1.1 17x192x2:0.45@1.5 33x192x1:0.45@1.9
stage --until 2300 --lr 1.5e-3 --decay 300 --buckets 17x192x2:0.25@1.5 33x192x2:0.75@1.7
