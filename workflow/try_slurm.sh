#!/usr/bin/env bash
# try_slurm.sh [METHOD,METHOD...]: a SLURM of one node on this machine, from Debian's packages, for as long as this
# takes; the tiny study through the slurm profile there; the same study by `steph study run`; are the numbers the same?
# Installing needs root; the daemons then run as whoever calls this, with all their files in a folder that is removed in
# the end. Needs snakemake and the slurm plugin on the PATH (pip install -e '.[workflow]').
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$project/.venv/bin/python}
methods=${1:-vanilla,ilra,transmil,steph}
export DEBIAN_FRONTEND=noninteractive OMP_NUM_THREADS=1
if ! command -v slurmctld slurmd munged srun >/dev/null; then
  apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge
fi
command -v snakemake >/dev/null || { echo "no snakemake on the PATH" >&2; exit 1; }

dir=$(mktemp -d "${TMPDIR:-/tmp}/steph-slurm.XXXXXX")
chmod 755 "$dir" # munge refuses a socket behind a folder that others cannot enter
me=$(id -un)
host=$(hostname -s)
export SLURM_CONF=$dir/slurm.conf
finish() {
  status=$?
  if [ $status != 0 ]; then tail -n 80 "$dir"/*.log "$dir"/work/.snakemake/slurm_logs/*/1.log 2>/dev/null || true; fi
  if [ -n "${engine-}" ]; then kill -9 "$engine" 2>/dev/null || true; fi
  scancel --user "$me" 2>/dev/null || true
  for daemon in slurmd slurmctld munged; do
    if [ -s "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true; fi
  done
  sleep 2
  rm -rf "$dir"
  exit $status
}
trap finish EXIT

mkdir -p "$dir"/{state,spool,work,bin}
# The plugin hides SLURM_CONF from the srun within a job; it is found in /etc/slurm on a real cluster.
printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v srun)" >"$dir/bin/srun"
chmod +x "$dir/bin/srun"
export PATH=$dir/bin:$PATH
cat >"$SLURM_CONF" <<CONF
ClusterName=steph
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
# Two GPUs that are none: any device file will do for SLURM to hand out.
printf 'NodeName=%s Name=gpu File=%s\n' "$host" /dev/null "$host" /dev/zero >"$dir/gres.conf"

dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
chmod 400 "$dir/munge.key"
munged --socket "$dir/munge.socket" --key-file "$dir/munge.key" --pid-file "$dir/munged.pid" \
  --seed-file "$dir/munge.seed" --log-file "$dir/munged.log"
slurmctld
slurmd -N "$host"
for _ in $(seq 30); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && break
  sleep 1
done
sinfo --long --Node
[ "$(sinfo --noheader --format=%t)" = idle ] || { echo "the node does not come up" >&2; exit 1; }
scontrol show node "$host" | grep -E 'CPUTot|Gres|State'

cd "$dir/work"
echo "== through SLURM"
STEPH_BUILD=$dir/slurm snakemake --snakefile "$project/workflow/Snakefile" \
  --workflow-profile "$project/workflow/profiles/slurm" \
  --config study=tiny "methods=$methods" "python=$python" \
  --jobs 4 --default-resources runtime=10 mem_mb=900 cpus_per_task=1 'gres=gpu:1' \
  --slurm-status-command squeue --slurm-init-seconds-before-status-checks 3 --latency-wait 5 &
engine=$!
while sleep 2 && kill -0 $engine 2>/dev/null; do
  # A job that has finished some of its runs is taken off the node once, as by preemption, and queued again.
  if [ ! -e "$dir/before" ]; then
    while IFS='_ ' read -r id _ _ dataset fold _; do
      if sha256sum "$dir/slurm/tiny/runs/$dataset"/*/"$fold"-*/run.json >"$dir/finished" 2>/dev/null; then
        echo "job $id is preempted; it had finished $(wc -l <"$dir/finished") runs"
        scontrol requeue "$id"
        mv "$dir/finished" "$dir/before"
        break
      fi
    done < <(squeue --noheader --states=running --format='%i %k')
  fi
done
wait $engine
sha256sum --check --quiet "$dir/before" # a run done again would give another time
echo "== what SLURM ran"
squeue --states=all --format='%.6i %.10T %.8M %.4C %.12b %k'
scontrol show job 1 | grep -E 'JobId|JobState|NumCPUs|TRES|TresPer' || true
sacct --completion --format=JobID,JobName%40,State,NodeList || true

echo "== the same on this machine, without"
STEPH_BUILD=$dir/here "$python" -m steph.cli study run --study tiny --workers 2 \
  $(printf -- '--method %s ' ${methods//,/ })
"$python" - "$dir/slurm" "$dir/here" <<'PY'
import json, sys
from pathlib import Path
def records(build):
    found = {path.parent.relative_to(build): json.loads(path.read_text()) for path in Path(build).glob("tiny/runs/*/*/*/run.json")}
    kept = ("predictions.csv", "model.safetensors")
    return {run: ([info["files"][name] for name in kept], info["metrics"]) for run, info in found.items()}
ours, theirs = map(records, sys.argv[1:])
assert ours and ours == theirs, f"{len(ours)} and {len(theirs)} runs; not the same"
print(f"the same: {len(ours)} runs, predictions and models bit for bit")
PY
