#!/bin/bash
# On every host, at every start of the machine, as root: installs the run's code and packages from its bucket, each by
# its sha256, and starts crystal.service. Doing it twice changes nothing. The machine that was asked for costs money from
# now on, so the timer that releases it is set before anything that can fail.

set -euo pipefail

# Tests run it with another root.
PREFIX=${CRYSTAL_PREFIX:-}
ETC=$PREFIX/etc/crystal
OPT=$PREFIX/opt/crystal
STATE=$PREFIX/var/lib/crystal
UNITS=$PREFIX/etc/systemd/system
STORAGE=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}
RETRY_SECONDS=${RETRY_SECONDS:-30}

metadata() {
  curl -fsS --retry 8 --retry-connrefused -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/$1"
}

attribute() {
  metadata "instance/attributes/$1"
}

# field FILE KEY ...: of what lies in a JSON file.
field() {
  python3 -c 'import functools, json, sys; print(functools.reduce(lambda found, key: found[key], sys.argv[2:], json.load(open(sys.argv[1]))))' "$@"
}

# put FILE TARGET: a whole file or none; the file's time stays if nothing changes.
put() {
  mkdir -p "$(dirname "$2")"
  cmp -s "$1" "$2" || { cp "$1" "$2.partial" && mv "$2.partial" "$2"; }
}

# storage ARGUMENTS: a request with this machine's rights. The token goes in by a file descriptor: command lines can be
# read by every user.
storage() {
  metadata instance/service-accounts/default/token >"$WORK/token"
  curl -fsS --retry 8 --retry-connrefused -H @<(echo "Authorization: Bearer $(field "$WORK/token" access_token)") "$@"
}

# object KEY FILE: from the run's folder in the bucket.
object() {
  storage -o "$2" "$STORAGE/storage/v1/b/$BUCKET/o/$RUN%2Fpod%2F${1//\//%2F}?alt=media" ||
    { echo "gs://$BUCKET/$RUN/pod/$1: can't be read; push it: tpu/push" >&2; return 1; }
}

# unpack KEY SHA256 FOLDER: an archive from the bucket, once.
unpack() {
  [[ ! -d $3 ]] || return 0
  rm -rf "$3.partial" "$3.tar"
  mkdir -p "$3.partial"
  object "$1" "$3.tar"
  echo "$2  $3.tar" | sha256sum --check --status || { echo "$1: sha256 isn't $2; push it again: tpu/push" >&2; return 1; }
  tar -xf "$3.tar" -C "$3.partial"
  rm "$3.tar"
  mv "$3.partial" "$3"
}

set_timer() {
  attribute crystal-watchdog >"$WORK/watchdog.sh"
  put "$WORK/watchdog.sh" "$ETC/watchdog.sh"
  cat >"$WORK/watchdog.service" <<UNIT
[Unit]
Description=Releases this capacity once the run has ended or its hours are over

[Service]
Type=oneshot
ExecStart=/bin/bash $ETC/watchdog.sh
UNIT
  cat >"$WORK/watchdog.timer" <<UNIT
[Timer]
OnActiveSec=5min
OnUnitInactiveSec=5min

[Install]
WantedBy=timers.target
UNIT
  put "$WORK/watchdog.service" "$UNITS/crystal-watchdog.service"
  put "$WORK/watchdog.timer" "$UNITS/crystal-watchdog.timer"
  systemctl daemon-reload
  systemctl enable --now crystal-watchdog.timer
}

# find_host: this host's number among all, slice after slice.
find_host() {
  local slice
  slice=$(attribute tpu-env 2>/dev/null | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p") || true
  echo $((${slice:-0} * $(attribute crystal-hosts) + $(attribute agent-worker-number)))
}

install_packages() {
  local environment=$1 folder=$OPT/environment-$1
  unpack "environment/$environment.tar" "$(field "$WORK/launch.json" environment sha256)" "$folder"
  [[ ! -e $folder/installed ]] || return 0
  # The image's own Python is older than ours, and hosts without an external address reach no package index.
  "$folder/python/bin/python3" -m venv --clear "$folder/venv"
  "$folder/venv/bin/python" -m pip install --quiet --no-deps --no-index --find-links="$folder/wheels" --require-hashes \
    -r "$folder/requirements.txt"
  touch "$folder/installed"
}

install_run() {
  local code environment
  object launch.json "$WORK/launch.json"
  code=$(field "$WORK/launch.json" code)
  environment=$(field "$WORK/launch.json" environment lock)
  unpack "code/$code.tar.gz" "$code" "$OPT/code-$code"
  install_packages "$environment"

  python3 - "$WORK/launch.json" "$(find_host)" "$(attribute crystal-hosts)" "$(attribute crystal-slices)" \
    "$(attribute crystal-incarnation)" "$BUCKET" "$RUN" "$STATE" >"$WORK/pod.json" <<'PYTHON'
import json, sys
launch, host, hosts, slices, incarnation, bucket, run, state = sys.argv[1:]
found = json.load(open(launch))
print(json.dumps({"bucket": bucket, "run": run, "host": int(host), "hosts": int(hosts) * int(slices),
                  "incarnation": int(incarnation), "code": found["code"], "environment": found["environment"]["lock"],
                  "launch": {"args": found["args"], "variables": found["variables"]}, "state": state}, indent=1))
PYTHON
  put "$WORK/pod.json" "$ETC/pod.json"
  ln -sfn "$OPT/code-$code" "$OPT/code.new" && mv -T "$OPT/code.new" "$OPT/code"
  ln -sfn "$OPT/environment-$environment" "$OPT/environment.new" && mv -T "$OPT/environment.new" "$OPT/environment"
  put "$OPT/code/tpu/crystal.service" "$UNITS/crystal.service"
  systemctl daemon-reload
  systemctl start crystal.service # does nothing where it runs
}

# report_failure: a heartbeat that says why this host can't start.
report_failure() {
  sleep 1 # for the last line of the errors
  python3 - "$(find_host)" "$(attribute crystal-incarnation)" "$WORK/errors" >"$WORK/heartbeat" <<'PYTHON'
import json, sys, time
host, incarnation, errors = sys.argv[1:]
lines = open(errors).read().strip().splitlines()
print(json.dumps({"host": int(host), "incarnation": int(incarnation), "state": "refusing", "step": -1, "crashes": [],
                  "why": f"startup: {lines[-1] if lines else 'failed'}"[:500], "time": int(time.time()), "facts": {}}))
PYTHON
  storage -o /dev/null -H 'Content-Type: application/json' --data-binary @"$WORK/heartbeat" \
    "$STORAGE/upload/storage/v1/b/$BUCKET/o?uploadType=media&name=$RUN%2Fpod%2Fheartbeats%2F$(find_host)"
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
set_timer
BUCKET=$(attribute crystal-bucket)
RUN=$(attribute crystal-run)
mkdir -p "$OPT" "$STATE"
# In a process of its own: in a condition, `set -e` doesn't hold.
while true; do
  install_run 2> >(tee "$WORK/errors" >&2) &
  if wait $!; then break; fi
  report_failure || true
  sleep "$RETRY_SECONDS"
done
