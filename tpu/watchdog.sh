#!/bin/bash
# On every host, every five minutes, as root: when the run has ended (DONE or FATAL in its bucket) or its hours are over,
# lets the trainer save and stop, and at the next look deletes the queued resource, all slices of it. Needs nothing that
# startup.sh installs, so a failed installation doesn't go on costing.

set -euo pipefail

PREFIX=${CRYSTAL_PREFIX:-}
STORAGE=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}
TPU=${TPU_API:-https://tpu.googleapis.com}
STOPPED=$PREFIX/run/crystal-stopped

metadata() {
  curl -fsS --retry 5 --retry-connrefused -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/$1"
}

# request ARGUMENTS: the HTTP code of a request with this machine's rights; 000: no answer.
request() {
  local token
  token=$(metadata instance/service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
  # The token goes in by a file descriptor: command lines can be read by every user.
  curl -sS -o /dev/null -w '%{http_code}' -H @- "$@" <<<"Authorization: Bearer $token" || true
}

BUCKET=$(metadata instance/attributes/crystal-bucket)
RUN=$(metadata instance/attributes/crystal-run)
EXPIRES=$(metadata instance/attributes/crystal-expires)
PROJECT=$(metadata project/project-id)
ZONE=$(metadata instance/zone)

why=
printf -v now '%(%s)T' -1
((now < EXPIRES)) || why="its hours are over"
for marker in DONE FATAL; do
  # Only an object that is there counts: a bucket that can't be reached ends nothing.
  [[ $(request "$STORAGE/storage/v1/b/$BUCKET/o/$RUN%2Fpod%2F$marker") != 200 ]] || why="the run has ended: $marker"
done
if [[ -z $why ]]; then
  rm -f "$STOPPED"
elif [[ ! -e $STOPPED ]]; then
  echo "$why: stopping the trainer"
  systemctl stop crystal.service || true
  mkdir -p "$(dirname "$STOPPED")"
  touch "$STOPPED"
else
  code=$(request -X DELETE "$TPU/v2/projects/$PROJECT/locations/${ZONE##*/}/queuedResources/$RUN?force=true")
  echo "$why: deleting the queued resource $RUN: HTTP $code"
fi
