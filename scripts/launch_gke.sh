#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster as a JobSet, which starts all pods again when one is preempted or fails.
#   IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/jaxcost bash scripts/launch_gke.sh my-run 2xv5e:4x4 CONFIG gs://BUCKET/RUN
# IMAGE holds this checkout, installed, as its working folder. QUEUE names the Kueue queue (XPK's by default), SPOT=1 takes
# spot nodes, RESTARTS says how often to start again. kubectl's own settings name the cluster. --dry-run prints the manifest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/launching.sh
usage="NAME v5e:4x4 CONFIG gs://BUCKET/FOLDER"
read_arguments "$@"
case $chip in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) fail "a GKE slice has v4, v5e, v5p, v6e or tpu7x chips, not $chip." ;;
esac
[ -n "${IMAGE:-}" ] || fail "set IMAGE to a container image that holds this checkout, installed."
per_host=$((chips < 4 ? chips : 4))
hosts=$((chips / per_host))
from_bucket /bucket
agree_to_cost
quoted() { printf '%s' "$1" | python -c 'import json, sys; print(json.dumps(sys.stdin.read()), end="")'; }
command=$(for word in "${train[@]}"; do printf ', %s' "$(quoted "$word")"; done)

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels: {kueue.x-k8s.io/queue-name: ${QUEUE:-multislice-queue}, xpk.google.com/workload: $name}
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}
spec:
  failurePolicy: {maxRestarts: ${RESTARTS:-100}}
  replicatedJobs:
  - name: slice-job
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          metadata: {labels: {xpk.google.com/workload: $name}, annotations: {gke-gcsfuse/volumes: \"true\"}}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            nodeSelector: {cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $shape${SPOT:+, cloud.google.com/gke-spot: \"true\"}}
            containers:
            - name: jax-tpu
              image: $(quoted "$IMAGE")
              command: [${command#, }]
              resources: {requests: {google.com/tpu: $per_host}, limits: {google.com/tpu: $per_host}}
              volumeMounts: [{name: bucket, mountPath: /bucket}]
            volumes:
            - name: bucket
              csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: $bucket, mountOptions: implicit-dirs}}"
if [ -n "$dry_run" ]; then echo "kubectl apply -f - <<MANIFEST"; echo "$manifest"; echo MANIFEST; else echo "$manifest" | kubectl apply -f -; fi
