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
