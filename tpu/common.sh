# shellcheck shell=bash
# Sourced by the scripts in tpu/: the run's settings, one way to call gcloud, one line for each way in which it fails.
# Its invariant: nothing is created before every setting has been read and checked.

set -euo pipefail

TPU_FOLDER=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$TPU_FOLDER")
SCRIPT=tpu/$(basename -- "$0")
PYTHON=${PYTHON:-$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)}
ENV_FILE=$TPU_FOLDER/pod.env
DRY_RUN=
ZONE=

# fail LINE: ends with the code of a user's mistake.
fail() {
  echo "$SCRIPT: $1" >&2
  exit 1
}

((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) ||
  fail "bash $BASH_VERSION: needs 4.4 or newer; on a Mac: brew install bash"

# usage: the comment at the head of the script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  echo
  echo "  --env=FILE   the run's settings; default tpu/pod.env, made from tpu/example.env"
  echo "  --zone=ZONE  instead of ZONES"
  echo "  --dry-run    print the commands, each as it could be typed, and run none"
  exit 0
}

# common_option ARGUMENT: takes in an option that every script has; false for another one.
common_option() {
  case $1 in
    --help | -h) usage ;;
    --dry-run) DRY_RUN=1 ;;
    --env=*) ENV_FILE=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    *) return 1 ;;
  esac
}

# only_common_options ARGUMENTS: for scripts without options of their own.
only_common_options() {
  local argument
  for argument in "$@"; do
    common_option "$argument" || fail "$argument: no such option; see $SCRIPT --help"
  done
}

# read_settings: the environment file, checked; then ZONES (or the one that was asked for), ZONE (the first), POD.
read_settings() {
  [[ -f $ENV_FILE ]] || fail "$ENV_FILE: missing; make one: cp tpu/example.env $(printf %q "$ENV_FILE")"
  bash -n "$ENV_FILE" || fail "$ENV_FILE: isn't bash; quote what has spaces"
  # shellcheck source=/dev/null
  source "$ENV_FILE"
  local name
  for name in PROJECT RUN BUCKET TPU_TYPE SLICES CAPACITY WAIT_HOURS MAX_HOURS SERVICE_ACCOUNT NETWORK SUBNETWORK OWNER; do
    [[ -n ${!name:-} ]] || fail "$ENV_FILE: $name is missing; tpu/example.env shows one"
  done
  [[ -v TRAIN_ARGS ]] || fail "$ENV_FILE: TRAIN_ARGS is missing; tpu/example.env shows one"
  [[ -z $ZONE ]] || ZONES=("$ZONE")
  [[ -n ${ZONES[0]:-} ]] || fail "$ENV_FILE: ZONES: one at least; see: gcloud compute tpus locations list"
  check PROJECT '^[a-z][a-z0-9-]{4,28}[a-z0-9]$' "a project's ID; see: gcloud projects list"
  check RUN '^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$' "lowercase letters, digits and dashes, 50 at most"
  check BUCKET '^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$' "a bucket's name without gs://; see: gcloud storage ls"
  for ZONE in "${ZONES[@]}"; do
    check ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z]$' "a zone such as us-east5-a; see: gcloud compute tpus locations list"
  done
  ZONE=${ZONES[0]}
  check OWNER '^[a-z0-9_-]{1,63}$' "lowercase letters, digits, dashes and underscores (a label)"
  check SLICES '^[1-9][0-9]*$' "a number of slices"
  check WAIT_HOURS '^[1-9][0-9]*$' "a whole number of hours"
  check MAX_HOURS '^[1-9][0-9]*$' "a whole number of hours"
  ((MAX_HOURS > WAIT_HOURS)) || fail "$ENV_FILE: MAX_HOURS=$MAX_HOURS: more than WAIT_HOURS=$WAIT_HOURS"
  check CAPACITY '^(spot|on-demand|reserved)$' "spot, on-demand or reserved"
  check SERVICE_ACCOUNT '^[^@ ,]+@[^@ ,]+$' "a service account's address; see: gcloud iam service-accounts list"
  # Last, so that a dry run and a wrong setting don't need it.
  [[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || fail "gcloud isn't installed; see https://cloud.google.com/sdk/docs/install"
  export POD=gs://$BUCKET/$RUN/pod
}

# check NAME PATTERN RULE
check() {
  [[ ${!1} =~ $2 ]] || fail "$ENV_FILE: $1=${!1}: $3"
}

# slice_field FIELD: what crystal_jax/generations.py knows of TPU_TYPE.
slice_field() {
  local found
  found=$(PYTHONPATH=$ROOT "$PYTHON" -m crystal_jax.generations "$TPU_TYPE" --flags="${FLAG_SET:-default}" --field="$1" 2>&1) ||
    fail "$ENV_FILE: $found"
  echo "$found"
}

# run COMMAND: runs it, or prints it as it could be typed.
run() {
  if [[ -n $DRY_RUN ]]; then
    printf '%q ' "$@"
    echo
    return
  fi
  "$@"
}

ERRORS=$(mktemp)
trap 'rm -f "$ERRORS"' EXIT

# try COMMAND: runs it and keeps what it says on stderr for last_error, which a subshell can read too.
try() {
  "$@" 2>"$ERRORS"
}

last_error() {
  tr '\n' ' ' <"$ERRORS"
}

# cloud COMMAND: runs or prints a call of gcloud; a failure ends the script with one line.
cloud() {
  if [[ -n $DRY_RUN ]]; then
    run "$@"
  else
    try "$@" || fail "$(explain "$(last_error)")"
  fi
}

# explain ERROR: what gcloud said, and the command that mends it. The order counts: NOT_FOUND and the ends of a login
# have one exit code.
explain() {
  local said mend
  case $1 in
    *"active account"* | *UNAUTHENTICATED* | *Reauthentication* | *invalid_grant* | *"auth login"*)
      mend="you aren't logged in; run: gcloud auth login" ;;
    *PERMISSION_DENIED* | *" 403"* | *"does not have permission"*)
      mend="a right, project or zone that isn't yours; see docs/tpu.md, and: gcloud projects get-iam-policy $PROJECT" ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*)
      mend="no quota for that; ask for it: https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT" ;;
    *ALREADY_EXISTS*)
      mend="the name $RUN is in use; whose it is: tpu/list; then another RUN, or tpu/delete" ;;
    *NOT_FOUND*queuedResources/*)
      mend="there is none in $ZONE; see: tpu/list" ;;
    *"ccelerator"* | *"runtime version"*)
      mend="not to be had in $ZONE; see: gcloud compute tpus accelerator-types list --project=$PROJECT --zone=$ZONE" ;;
    *"ocation"*)
      mend="no such zone for TPUs; see: gcloud compute tpus locations list --project=$PROJECT" ;;
    *"bucket does not exist"* | *"BucketNotFound"* | *"bucket"*404* | *"not found: 404"*)
      mend="make it: gcloud storage buckets create gs://$BUCKET --location=${ZONE%-*} --uniform-bucket-level-access" ;;
    *) mend="it isn't known what happened; look before doing it again: tpu/status" ;;
  esac
  said=${1#*ERROR: }
  echo "${said:0:300} ($mend)"
}

# is_gone ERROR: true where the resource is known not to exist; any other failure leaves that open.
is_gone() {
  [[ $1 == *NOT_FOUND*"queuedResources/$RUN'"* ]]
}
