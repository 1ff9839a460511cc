#!/usr/bin/env bash
# on_a_gpu.sh COMMAND...: run it on a GPU that no other command started this way uses; wait for one where there is none.
# Where just one can be seen, as in a cluster's job that asked for one, it is that.
set -eu
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
case $visible in *,*) ;; *) exec "$@" ;; esac
while true; do
  for gpu in ${visible//,/ }; do
    exec {lock}>"${TMPDIR:-/tmp}/steph-$UID-gpu-$gpu.lock"
    if flock -n "$lock"; then # let go when the command ends, however it ends
      CUDA_VISIBLE_DEVICES=$gpu exec "$@"
    fi
    exec {lock}>&-
  done
  sleep 1
done
