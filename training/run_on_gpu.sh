#!/bin/bash
# One stage on a GPU machine that lives only for a while: compile if that works within two minutes,
# then train for SECONDS_LEFT, with as many steps as the measured rate allows.
#   training/run_on_gpu.sh STAGE SECONDS_LEFT OUT [more arguments of training.train]
set -u
stage=$1 seconds=$2 out=$3
shift 3
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
mode=--compile
if ! timeout 130 python3 -m training.train --stage "$stage" --steps 40 --out "$out/pilot" \
    --log-every 10 --evaluate-every 1000 $mode "$@" 2>"$out.pilot.err" | cut -c1-200; then mode=; fi
rate=$(grep -o '"tokens_per_second": [0-9]*' "$out/pilot/log.jsonl" | grep -o '[0-9]*$' | sort -n | tail -1)
if [ -z "${rate:-}" ] || [ "$rate" -lt 140000 ]; then mode= rate=130000; fi
left=$((seconds - SECONDS))
spare=45
[ -n "$mode" ] && spare=180  # compilation, once for each set of switches
steps=$((rate * (left - spare) / 65536))
[ "$steps" -gt 2500 ] && steps=2500
echo "mode '$mode' rate $rate steps $steps left $left"
rm -f "$out/pilot/"*.pt
timeout $((left + 20)) python3 -m training.train --stage "$stage" --steps "$steps" --out "$out" \
    --minutes "$(python3 -c "print(($left - 20) / 60)")" $mode "$@" 2>"$out.err" | cut -c1-260
tail -c 600 "$out.err"
