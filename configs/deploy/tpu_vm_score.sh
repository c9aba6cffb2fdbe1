#!/usr/bin/env bash
# A batch job on all hosts of a Cloud TPU slice, which know their ranks by themselves:
#   configs/deploy/tpu_vm_score.sh NAME ZONE INPUT OUTPUT
# xlinfer must be installed on them: pip install 'xlinfer[tpu,hub,score]'. The same command again
# goes on where the job was, after a preemption too.
set -euo pipefail

name="$1" zone="$2" input="$3" output="$4"
command="python3 -m xlinfer.score --runner=static \
  --model=meta-llama/Llama-3.1-8B-Instruct --task=loglikelihood \
  --input=$(printf %q "$input") --output=$(printf %q "$output")"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
