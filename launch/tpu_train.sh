#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice, from this machine: create, install, start, follow, and again after a preemption. See --help.
set -euo pipefail
PROGRAM=tpu_train.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# shellcheck source=launch/common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Trains on a Cloud TPU: creates or reuses it, copies the code of this checkout's HEAD and the config to all its workers, installs
zip_rc_jax there, starts `zip-rc train` on all of them so that it survives the connection, and shows worker 0's log until it ends.
After a preemption the TPU is deleted, created again, and the training goes on from its last checkpoint.

  launch/tpu_train.sh CONFIG --stage STAGE --name NAME --zone ZONE --type TYPE --run-dir gs://BUCKET/PATH [option ...]
                      [section.key=value ...]

what to train
  CONFIG                 YAML file, copied to the workers; paths in it are paths there
  --stage STAGE          policy, critic, final or lite (STAGE)
  --run-dir DIR          run_dir of the training, with the rollouts that the stage reads (RUN_DIR). gs://BUCKET/PATH is mounted on
                         every worker with gcsfuse; best a bucket with hierarchical namespace, which renames directories in one step.
                         With --no-resume also an absolute path on the workers, for example of a mounted file store
  --package SPEC         pip-install this instead of HEAD, for example 'zip-rc-jax[tpu] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'
                         (PACKAGE)
where
  --name NAME            of the TPU, and of its queued resource (TPU_NAME)
  --zone ZONE            for example us-east5-b (TPU_ZONE)
  --type TYPE            accelerator type, for example v6e-8 or v5litepod-16 (ACCELERATOR_TYPE or TPU_TYPE)
  --project ID           default: the one that gcloud is set to (GCP_PROJECT)
  --runtime-version V    default: the one for JAX on this type (RUNTIME_VERSION)
  --spot                 a spot TPU: cheaper, and may be taken away at any time (TPU_SPOT=1)
  --no-queue             create the TPU at once or not at all, instead of queueing for it (TPU_QUEUE=0)
  --create-flag FLAG     one more flag for the create command, for example --create-flag=--network=NETWORK; repeatable
  --ssh-flag FLAG        one more flag for the ssh and scp commands, for example --ssh-flag=--internal-ip; repeatable
how
  --no-resume            stop after a preemption (RESUME=0)
  --max-restarts N       give up after so many preemptions and interruptions, default 50 (MAX_RESTARTS)
  --wait SECONDS         how long to wait for the TPU, default 21600; the queued request expires then too (WAIT_SECONDS)
  --poll SECONDS         time between two looks at state and log, default 30 (POLL_SECONDS)
  --delete-when-done     delete the TPU when the training has ended, also if it failed (DELETE_WHEN_DONE=1)
  --dry-run              print the commands, one a line, as they can be pasted into a shell, and run nothing

Names in parentheses are environment variables; an option wins over them. The same command, called again, follows a training that
runs, and starts or resumes one that does not. Ctrl-C ends only the following. Exit status: that of zip-rc; 1 if the TPU could not be
had or was lost; 2 for bad input. For slices of several workers, gcloud wants the key in your agent: ssh-add ~/.ssh/google_compute_engine

examples:
  # see what would happen
  launch/tpu_train.sh configs/chain_sum.yaml --stage final --name zip --zone us-east5-b --type v6e-8 --run-dir gs://BUCKET/run --dry-run
  # a spot slice of two hosts, deleted at the end
  export TPU_NAME=zip TPU_ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 RUN_DIR=gs://BUCKET/run
  launch/tpu_train.sh configs/chain_sum.yaml --stage critic --spot --delete-when-done critic.steps=2000
TEXT
}

REMOTE=zip_rc_launch # directory in the home of every worker
CONFIG='' OVERRIDES=() CREATE_FLAGS=() SSH_FLAGS=() DRY_RUN=0
STAGE=${STAGE:-} PACKAGE=${PACKAGE:-} RUN_DIR=${RUN_DIR:-}
NAME=${TPU_NAME:-} ZONE=${TPU_ZONE:-} TYPE=${ACCELERATOR_TYPE:-${TPU_TYPE:-}} PROJECT=${GCP_PROJECT:-} RUNTIME=${RUNTIME_VERSION:-}
SPOT=${TPU_SPOT:-0} QUEUE=${TPU_QUEUE:-1} RESUME=${RESUME:-1} DELETE=${DELETE_WHEN_DONE:-0}
MAX_RESTARTS=${MAX_RESTARTS:-50} WAIT=${WAIT_SECONDS:-21600} POLL=${POLL_SECONDS:-30}

parse() {
  split_options "$@"
  set -- ${WORDS[@]+"${WORDS[@]}"}
  while (($#)); do
    case $1 in
      --stage | --run-dir | --package | --name | --zone | --type | --project | --runtime-version | --create-flag | --ssh-flag | \
        --max-restarts | --wait | --poll)
        (($# >= 2)) || fail "option $1" "it needs a value" "see --help"
        case $1 in
          --stage) STAGE=$2 ;;
          --run-dir) RUN_DIR=$2 ;;
          --package) PACKAGE=$2 ;;
          --name) NAME=$2 ;;
          --zone) ZONE=$2 ;;
          --type) TYPE=$2 ;;
          --project) PROJECT=$2 ;;
          --runtime-version) RUNTIME=$2 ;;
          --create-flag) CREATE_FLAGS+=("$2") ;;
          --ssh-flag) SSH_FLAGS+=("$2") ;;
          --max-restarts) MAX_RESTARTS=$2 ;;
          --wait) WAIT=$2 ;;
          --poll) POLL=$2 ;;
        esac
        shift
        ;;
      --spot) SPOT=1 ;;
      --no-queue) QUEUE=0 ;;
      --no-resume) RESUME=0 ;;
      --delete-when-done) DELETE=1 ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage && exit ;;
      *)
        if [[ -z $CONFIG && $1 != -* ]]; then
          CONFIG=$1
        else
          check_override "$1"
          OVERRIDES+=("$1")
        fi
        ;;
    esac
    shift
  done
}

# The software version that Google names for JAX: https://cloud.google.com/tpu/docs/runtimes
default_runtime() {
  case $TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

validate() {
  local word
  check_characters "$CONFIG" "$STAGE" "$RUN_DIR" "$PACKAGE" "$NAME" "$ZONE" "$TYPE" "$PROJECT" "$RUNTIME" "$MAX_RESTARTS" "$WAIT" \
    "$POLL" ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
  check_config "$CONFIG"
  check_stage "$STAGE"
  matches TPU_NAME "$NAME" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' \
    "names have small letters, digits and hyphens, at most 63, and begin with a letter" "set --name, for example --name zip-rc"
  matches TPU_ZONE "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z]' "it is no zone" \
    "set --zone, for example --zone us-east5-b; gcloud compute tpus locations list shows them"
  [[ ! $TYPE =~ ^v5e-([0-9]+)$ ]] || fail "ACCELERATOR_TYPE='$TYPE'" "Google calls the v5e otherwise" \
    "use --type v5litepod-${BASH_REMATCH[1]}"
  [[ ! $TYPE =~ ^(tpu|v)7 ]] || fail "ACCELERATOR_TYPE='$TYPE'" \
    "the Cloud TPU API ends with v6e; later TPUs are had from Compute Engine or GKE" \
    "use an older type, or start launch/tpu_worker.sh on such a machine yourself"
  matches ACCELERATOR_TYPE "$TYPE" '(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]*' "types are v2-N, v3-N, v4-N, v5litepod-N, v5p-N and v6e-N" \
    "set --type, for example --type v6e-8; gcloud compute tpus accelerator-types list shows those of a zone"
  RUNTIME=${RUNTIME:-$(default_runtime)}
  matches RUNTIME_VERSION "$RUNTIME" '[a-z0-9][a-z0-9._-]*' "it is no version" "leave it out to get $(default_runtime)"
  [[ -z $PROJECT ]] || matches GCP_PROJECT "$PROJECT" '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' "it is no project id" \
    "gcloud projects list shows yours; leave it out to use the one that gcloud is set to"
  one_of TPU_SPOT "$SPOT" 0 1
  one_of TPU_QUEUE "$QUEUE" 0 1
  one_of RESUME "$RESUME" 0 1
  one_of DELETE_WHEN_DONE "$DELETE" 0 1
  matches MAX_RESTARTS "$MAX_RESTARTS" '[0-9]{1,6}' "it is a count" "use a whole number, for example 50"
  matches WAIT_SECONDS "$WAIT" '[1-9][0-9]{0,6}' "it is a time in seconds" "use a whole number, for example 21600"
  matches POLL_SECONDS "$POLL" '([1-9][0-9]{0,4}|0\.[0-9]*[1-9])' "it is a time in seconds" "use a positive number, for example 30"
  for word in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    [[ $word != run_dir=* ]] || fail "setting '$word'" "this script has to know it" "write --run-dir '${word#run_dir=}'"
  done
  check_run_dir
  if [[ -n $PACKAGE ]]; then
    [[ $PACKAGE == *"[tpu]"* ]] || fail "PACKAGE='$PACKAGE'" "without the extra [tpu] JAX would not find the TPU" \
      "write it as 'zip-rc-jax[tpu] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'"
  else
    [[ -e $ROOT/.git ]] || fail "directory $ROOT" "it is no git checkout, so there is no HEAD to copy" \
      "add --package 'zip-rc-jax[tpu] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'"
  fi
  ((DRY_RUN)) || command -v gcloud >/dev/null || fail "gcloud" "it is not installed, or not on PATH" \
    "see https://cloud.google.com/sdk/docs/install, or add --dry-run"
}

check_run_dir() {
  case $RUN_DIR in
    gs://*)
      matches RUN_DIR "$RUN_DIR" "$BUCKET_PATH" "it is no directory in a bucket (whose names are in small letters)" "write gs://BUCKET/PATH"
      ;;
    /*)
      ((RESUME == 0)) || fail "RUN_DIR='$RUN_DIR'" "after a preemption the new TPU would not have it" \
        "use gs://BUCKET/PATH, or add --no-resume"
      ;;
    '')
      ((RESUME == 0)) || fail "RUN_DIR" "it is not set, and after a preemption nothing would be left to go on from" \
        "set --run-dir gs://BUCKET/PATH, or add --no-resume"
      ((DELETE == 0)) || fail "--delete-when-done" "without --run-dir the results lie on the TPU's own disk, and would be deleted with it" \
        "set --run-dir, or leave --delete-when-done out"
      ;;
    *) fail "RUN_DIR='$RUN_DIR'" "it is neither in a bucket nor an absolute path on the workers" "write gs://BUCKET/PATH" ;;
  esac
}

# Every command that this script runs, as arrays.
build_commands() {
  local where=("--zone=$ZONE") create=() worker files stage_dir commit
  [[ -z $PROJECT ]] || where+=("--project=$PROJECT")
  ((SPOT == 0)) || create+=(--spot)
  create+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})
  local queued=(gcloud compute tpus queued-resources) vm=(gcloud compute tpus tpu-vm)
  QUEUED_STATE=("${queued[@]}" describe "$NAME" "${where[@]}" '--format=value(state.state,state.stateInitiator)')
  QUEUED_DETAILS=("${queued[@]}" describe "$NAME" "${where[@]}" '--format=yaml(state)')
  VM_STATE=("${vm[@]}" describe "$NAME" "${where[@]}" '--format=value(state,acceleratorType)')
  if ((QUEUE)); then
    CREATE=("${queued[@]}" create "$NAME" "${where[@]}" "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME"
      "--valid-until-duration=${WAIT}s" ${create[@]+"${create[@]}"})
    DELETE_COMMAND=("${queued[@]}" delete "$NAME" "${where[@]}" --force --quiet)
  else
    CREATE=("${vm[@]}" create "$NAME" "${where[@]}" "--accelerator-type=$TYPE" "--version=$RUNTIME" ${create[@]+"${create[@]}"})
    DELETE_COMMAND=("${vm[@]}" delete "$NAME" "${where[@]}" --quiet)
  fi

  stage_dir=${XDG_CACHE_HOME:-$HOME/.cache}/zip_rc_jax/launch/$NAME
  PACK=()
  files=("$HERE/tpu_worker.sh" "$HERE/common.sh" "$CONFIG")
  worker=(bash tpu_worker.sh "$(basename "$CONFIG")" --stage "$STAGE" --dir . --platform tpu --detach)
  if [[ -n $PACKAGE ]]; then
    worker+=(--package "$PACKAGE")
  else
    PACK_DIRECTORY=(mkdir -p "$stage_dir")
    PACK=(git -C "$ROOT" archive --format=tar.gz "--output=$stage_dir/code.tar.gz" HEAD)
    files+=("$stage_dir/code.tar.gz")
    # For environment.json: the archive does not say it. It holds what is committed, whatever else lies in the checkout.
    commit=$(git -C "$ROOT" rev-parse --verify --quiet HEAD) || fail "directory $ROOT" "its git checkout has no commit" "commit first"
    worker=(env "ZIP_RC_COMMIT=$commit" "${worker[@]}" --archive code.tar.gz)
  fi
  [[ -z $RUN_DIR ]] || worker+=(--run-dir "$RUN_DIR")
  worker+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
  where+=(--quiet ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"})
  SSH_ALL=("${vm[@]}" ssh "$NAME" "${where[@]}" --worker=all)
  SSH_FIRST=("${vm[@]}" ssh "$NAME" "${where[@]}" --worker=0)
  PREPARE=("${SSH_ALL[@]}" "--command=mkdir -p $REMOTE")
  COPY=("${vm[@]}" scp "${files[@]}" "$NAME:$REMOTE/" "${where[@]}" --worker=all)
  START=("${SSH_ALL[@]}" "--command=cd $REMOTE && $(quote "${worker[@]}")")
  STATUS=("${SSH_ALL[@]}" "--command=bash $REMOTE/tpu_worker.sh --status --dir $REMOTE")
}

log_command() {
  LOG=("${SSH_FIRST[@]}" "--command=tail -c +$OFFSET $REMOTE/log")
}

print_commands() {
  OFFSET=1
  log_command
  say "these commands would run; waiting and asking again is left out"
  if ((${#PACK[@]})); then
    quote "${PACK_DIRECTORY[@]}"
    quote "${PACK[@]}"
  fi
  quote "${CREATE[@]}"
  ((QUEUE == 0)) || quote "${QUEUED_STATE[@]}"
  quote "${VM_STATE[@]}"
  quote "${PREPARE[@]}"
  quote "${COPY[@]}"
  quote "${START[@]}"
  quote "${STATUS[@]}"
  quote "${LOG[@]}"
  if ((DELETE)); then
    quote "${DELETE_COMMAND[@]}"
  fi
  ((RESUME == 0)) || say "after a preemption: $(quote "${DELETE_COMMAND[@]}"), then again from the create command on"
}

# Ends this script because of something out there. stop STATUS TEXT...
stop() {
  local status=$1
  shift
  say "$@"
  exit "$status"
}

run() {
  say "$(quote "$@")"
  "$@"
}

# Prints the state that a describe command reports, MISSING for no such resource. Status 1 if gcloud cannot say, after some tries.
ask() {
  local try found
  for try in 1 2 3 4 5; do
    if found=$("$@" 2>"$SCRATCH/ask"); then
      printf '%s\n' "${found:-STATE_UNSPECIFIED}"
      return
    fi
    if grep -q NOT_FOUND "$SCRATCH/ask"; then
      echo MISSING
      return
    fi
    # What will not pass by itself.
    grep -Eq 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|gcloud auth login' "$SCRATCH/ask" && break
    ((try == 5)) || sleep "$POLL"
  done
  cat "$SCRATCH/ask" >&2
  return 1
}

# Sets STATE to what the TPU is in, KIND to what that means (ready, waiting, absent, failed, gone after a preemption, stopped), THERE
# to its accelerator type once there is one, and INITIATOR to USER where not Google, but somebody, suspended the queued resource.
look() {
  STATE=MISSING THERE='' INITIATOR=''
  if ((QUEUE)); then
    STATE=$(ask "${QUEUED_STATE[@]}") || stop 1 "gcloud could not say in which state queued resource $NAME is (see above)"
    read -r STATE INITIATOR <<<"$STATE"
    case $STATE in
      ACTIVE) ;;
      MISSING) KIND=absent && return ;;
      FAILED) KIND=failed && return ;;
      SUSPENDED) KIND=gone && return ;;
      *) KIND=waiting && return ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
    esac
  fi
  STATE=$(ask "${VM_STATE[@]}") || stop 1 "gcloud could not say in which state TPU $NAME is (see above)"
  read -r STATE THERE <<<"$STATE"
  case $STATE in
    READY) KIND=ready ;;
    PREEMPTED | TERMINATED) KIND=gone ;;
    STOPPED | HIDDEN) KIND=stopped ;;
    MISSING) if ((QUEUE)); then KIND=waiting; else KIND=absent; fi ;;
    *) KIND=waiting ;; # CREATING, STARTING, RESTARTING, REIMAGING, REPAIRING, STOPPING, DELETING, ...
  esac
}

# Ends this script if somebody took the TPU away, to stop paying perhaps: after a preemption only is it created again.
respect_deletion() {
  case $KIND:$STATE:$INITIATOR in
    absent:* | stopped:* | *:SUSPENDED:USER) stop 1 "TPU $NAME was deleted or stopped by someone else ($STATE)" ;;
  esac
}

show_state() {
  [[ $STATE == "$SHOWN" ]] || say "TPU $NAME: $STATE"
  SHOWN=$STATE
}

# Returns when the TPU is ready. RECREATING is 1 if one was there before.
get_tpu() {
  local deadline=$((SECONDS + WAIT)) asked=0 deleted=0
  while :; do
    look
    show_state
    # A deletion reaches the training first, which ends as interrupted. What this script deleted is suspended by the user too.
    ((!RECREATING || deleted)) || respect_deletion
    case $KIND in
      ready)
        [[ -z $THERE || ${THERE##*/} == "$TYPE" ]] || fail "TPU $NAME" "it is there already, as ${THERE##*/} and not $TYPE" \
          "use another --name, or delete it with: $(quote "${DELETE_COMMAND[@]}")"
        return
        ;;
      stopped) stop 1 "TPU $NAME is $STATE. Start it with gcloud compute tpus tpu-vm start $NAME --zone=$ZONE, or use another --name" ;;
      failed)
        if ((asked)); then
          "${QUEUED_DETAILS[@]}" >&2 || true
          # A request fails also for want of capacity, which is frequent after a preemption.
          ((RECREATING)) || stop 1 "the request for TPU $NAME failed (see above). Delete it with: $(quote "${DELETE_COMMAND[@]}")"
          say "the request failed; trying again"
        fi
        deleted=1
        run "${DELETE_COMMAND[@]}" || stop 1 "the failed request of that name could not be deleted (see above)"
        ;;
      gone)
        deleted=1
        run "${DELETE_COMMAND[@]}" || say "deleting failed; trying again"
        ;;
      absent)
        if run "${CREATE[@]}"; then
          asked=1
          continue
        fi
        # Right after a preemption there is often no capacity, and without a queue somebody has to ask again.
        ((RECREATING)) || stop 1 "TPU $NAME could not be created (see above)"
        say "creating failed; trying again"
        ;;
      waiting) ;;
    esac
    ((SECONDS < deadline)) || stop 1 "TPU $NAME was not ready within $WAIT seconds (it is $STATE)." \
      "Raise --wait, try another zone or type, or delete it with: $(quote "${DELETE_COMMAND[@]}")"
    sleep "$POLL"
  done
}

# Copies everything and starts the training. Status 1 if the TPU went away meanwhile.
deploy() {
  local try status
  for try in 1 2 3; do
    if run "${PREPARE[@]}" </dev/null && run "${COPY[@]}" </dev/null; then
      status=0
      run "${START[@]}" </dev/null || status=$?
      ((status != 2)) || stop 2 "the workers refused to start the training (see above)"
      ((status)) || return 0
    fi
    sleep "$POLL"
    look
    show_state
    respect_deletion
    [[ $KIND == ready ]] || return 1
  done
  stop 1 "TPU $NAME is ready, but its workers could not be reached or prepared (see above)"
}

show_log() {
  log_command
  if "${LOG[@]}" </dev/null >"$SCRATCH/log" 2>"$SCRATCH/ssh"; then
    cat "$SCRATCH/log"
    OFFSET=$((OFFSET + $(wc -c <"$SCRATCH/log")))
  fi
}

# Sets FOUND to what the workers say together: a status, running, or interrupted. Status 1 if not all of them answered.
ask_workers() {
  local answers word running=0 interrupted=0
  answers=$("${STATUS[@]}" </dev/null 2>"$SCRATCH/ssh") || return
  answers=$(sed -n 's/^zip_rc_status: //p' <<<"$answers")
  [[ -n $answers ]] || return
  FOUND=''
  for word in $answers; do
    case $word in
      0) ;;
      running) running=1 ;;
      # 130: zip-rc saved its state after SIGTERM, or lost another process; 143: SIGTERM came before there was any state.
      none | lost | 130 | 143) interrupted=1 ;;
      # JAX ended it because another one was lost, or, where there is no other one, it crashed and would crash again.
      134) if [[ $answers == *$'\n'* ]]; then interrupted=1; else FOUND=134; fi ;;
      *) FOUND=$word ;; # the others would wait for this one in vain
    esac
  done
  if [[ -z $FOUND ]]; then
    if ((running)); then FOUND=running; elif ((interrupted)); then FOUND=interrupted; else FOUND=0; fi
  fi
}

# Shows the log until the training has ended. Sets FOUND to its status, interrupted, or preempted.
follow() {
  local misses=0 deadline=$((SECONDS + WAIT))
  OFFSET=1
  while :; do
    sleep "$POLL"
    look
    show_state
    respect_deletion
    case $KIND in
      gone | failed) FOUND=preempted && return ;;
      waiting)
        ((SECONDS < deadline)) || stop 1 "TPU $NAME has been $STATE for $WAIT seconds"
        continue
        ;;
      ready) deadline=$((SECONDS + WAIT)) ;;
    esac
    if ask_workers; then
      misses=0
      show_log
      [[ $FOUND == running ]] || return 0
    else
      misses=$((misses + 1))
      if ((misses == 10)); then
        cat "$SCRATCH/ssh" >&2
        stop 1 "the workers of TPU $NAME did not answer 10 times in a row (see above). The training may go on; the same command follows it"
      fi
    fi
  done
}

train() {
  local restarts=0 seen='' reason=''
  RECREATING=0 SHOWN=''
  if ((${#PACK[@]})); then
    "${PACK_DIRECTORY[@]}"
    seen=$(git -C "$ROOT" status --porcelain 2>/dev/null | head -n 1 || true)
    [[ -z $seen ]] || say "note: changes that are not committed are not copied"
    run "${PACK[@]}" || stop 1 "the code could not be packed"
  fi
  while :; do
    get_tpu
    FOUND=preempted
    if deploy; then
      follow
    fi
    case $FOUND in
      preempted | interrupted) ;;
      *) break ;;
    esac
    if ((!RESUME)); then
      reason="the training was $FOUND. Without --no-resume it would go on from its last checkpoint"
    elif ((restarts >= MAX_RESTARTS)); then
      reason="the training was $FOUND again, after $restarts restarts. Raise --max-restarts, or look at the log"
    fi
    if [[ -n $reason ]]; then
      FOUND=1 # nothing trains any more, so the TPU is deleted or pointed out as after any other end
      break
    fi
    restarts=$((restarts + 1))
    RECREATING=1
    say "the training was $FOUND; restart $restarts of at most $MAX_RESTARTS"
  done
  if [[ -n $reason ]]; then
    say "$reason"
  elif ((FOUND)); then
    say "the training failed with status $FOUND (see the log above; worker 0 keeps it in $REMOTE/log)"
  else
    say "the training is done${RUN_DIR:+, results in $RUN_DIR/$STAGE}"
  fi
  if ((DELETE)); then
    run "${DELETE_COMMAND[@]}" || stop 1 "TPU $NAME could not be deleted, and costs money until it is"
  elif [[ $KIND != ready ]]; then
    say "TPU $NAME is $STATE. Delete what is left of it with: $(quote "${DELETE_COMMAND[@]}")"
  else
    say "TPU $NAME still runs and costs money. Delete it with: $(quote "${DELETE_COMMAND[@]}")"
  fi
  exit "$FOUND"
}

# shellcheck disable=SC2329 # a trap calls it
unfollow() {
  say "no longer following TPU $NAME; what runs there goes on. The same command follows it again"
  kill "$CHILD" 2>/dev/null || true
  exit 130
}

main() {
  parse "$@"
  validate
  build_commands
  if ((DRY_RUN)); then
    print_commands
    return
  fi
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  # The work is done by a child, and this shell only waits: bash 5.2 may die of a trap that comes while it expands $(...).
  train &
  CHILD=$!
  trap unfollow INT TERM
  wait "$CHILD"
}

# bash reads a script while it runs it: with `exit` on the same line nothing more is read after main, should the file have changed.
main "$@"; exit
