#!/usr/bin/env bash
# Runs sweeps of the study one after the other, from what is committed of them: sweeps/study/run.sh rates main …
# What they find is exported into sweeps/study/NAME every two hours and at each end, for machines end before sweeps do;
# shards are only ever added. TERM ends the sweep that runs in order, exports it and stops.
set -euo pipefail
cd "$(dirname "$0")/../.."
EVERY=${EVERY:-7200}
altgrad=.venv/bin/altgrad
sweep=

stop() {
    trap - TERM INT
    if [ -n "$sweep" ]; then
        kill -TERM "$sweep" || echo "the sweep had just ended by itself"
        code=0
        wait "$sweep" || code=$?
        echo "the sweep ended with $code"
        "$altgrad" export --lean "$out" "sweeps/study/$name"
    fi
    exit 143
}
trap stop TERM INT

for name in "$@"; do
    out=runs/study_$name
    if [ ! -e "$out/ledger.sqlite" ] && [ -d "sweeps/study/$name" ]; then
        "$altgrad" import "sweeps/study/$name" "$out"
    fi
    .venv/bin/python "sweeps/study_$name.py" --out "$out" --wandb off &
    sweep=$!
    waited=0
    while kill -0 "$sweep" 2>/dev/null; do
        sleep 10 & wait $!
        waited=$((waited + 10))
        if [ "$waited" -ge "$EVERY" ]; then
            "$altgrad" export --lean "$out" "sweeps/study/$name"
            waited=0
        fi
    done
    code=0
    wait "$sweep" || code=$?
    sweep=
    "$altgrad" export --lean "$out" "sweeps/study/$name"  # whatever it ended with, what it found is kept
    [ "$code" = 0 ] || exit "$code"
done
