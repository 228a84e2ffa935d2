#!/usr/bin/env bash
# What every worker of a TPU runs (tpu_train.sh starts it): install, train, leave the exit status behind. See --help.
set -euo pipefail
PROGRAM=tpu_worker.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Sets up a virtual environment, runs `zip-rc train`, and writes its exit status to DIR/status. tpu_train.sh copies this script to every
worker of a TPU and starts it there with --detach; it runs on any other Linux machine too.

  tpu_worker.sh CONFIG --stage STAGE (--archive FILE | --package SPEC | --no-install) [option ...] [section.key=value ...]
  tpu_worker.sh --status [--dir DIR]

  --stage STAGE      policy, critic, final or lite
  --dir DIR          where venv/, log, pid and status go (default ~/zip_rc_launch)
  --run-dir DIR      run_dir of the training: gs://BUCKET/PATH, which is mounted with gcsfuse under DIR/gcs (and gcsfuse installed,
                     with sudo, if it is missing), or a directory
  --archive FILE     install zip_rc_jax with its extra [tpu] from this tar.gz of the repository
  --package SPEC     install this instead, for example '.[tpu]' in a checkout, or
                     'zip-rc-jax[tpu] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'
  --no-install       use the virtual environment as it is
  --venv DIR         virtual environment, made if it does not exist (default DIR/venv)
  --platform NAME    tpu, cuda or cpu: JAX must find it. Default: whatever JAX finds
  --detach           go on in the background, also after the ssh session has ended; output goes to DIR/log. If the same command
                     already runs there, nothing is started
  --dry-run          print the commands, one a line, as they can be pasted into a shell, and run nothing
  --status           print `zip_rc_status: ` and running, none (never started), lost (killed without a trace), or the exit status

Exit status: that of zip-rc (130 after SIGTERM, once the state is saved: the same command resumes); 2 for bad input.

examples:
  # see what would happen on a machine with a TPU; there, --detach instead runs it in the background
  launch/tpu_worker.sh configs/chain_sum.yaml --stage final --package '.[tpu]' --platform tpu --run-dir gs://BUCKET/run --dry-run
  # on this machine, with the virtual environment of `make demo`
  launch/tpu_worker.sh configs/chain_sum_demo.yaml --stage critic --dir /tmp/worker --venv .venv --no-install critic.steps=20
TEXT
}

CONFIG='' STAGE='' DIR=$HOME/zip_rc_launch RUN_DIR='' ARCHIVE='' PACKAGE='' INSTALL=1 VENV='' PLATFORM='' DETACH=0 STATUS=0 DRY_RUN=0
OVERRIDES=()

parse() {
  split_options "$@"
  set -- ${WORDS[@]+"${WORDS[@]}"}
  while (($#)); do
    case $1 in
      --stage | --dir | --run-dir | --archive | --package | --venv | --platform)
        (($# >= 2)) || fail "option $1" "it needs a value" "see --help"
        case $1 in
          --stage) STAGE=$2 ;;
          --dir) DIR=$2 ;;
          --run-dir) RUN_DIR=$2 ;;
          --archive) ARCHIVE=$2 ;;
          --package) PACKAGE=$2 ;;
          --venv) VENV=$2 ;;
          --platform) PLATFORM=$2 ;;
        esac
        shift
        ;;
      --no-install) INSTALL=0 ;;
      --detach) DETACH=1 ;;
      --status) STATUS=1 ;;
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

validate() {
  check_config "$CONFIG"
  check_stage "$STAGE"
  [[ -z $PLATFORM ]] || one_of --platform "$PLATFORM" tpu cuda cpu
  local sources=$(((1 - INSTALL) + (${#ARCHIVE} > 0) + (${#PACKAGE} > 0)))
  ((sources == 1)) || fail "--archive, --package, --no-install" "$sources of them are given, and one says where zip_rc_jax comes from" \
    "give exactly one"
  [[ -z $ARCHIVE || -f $ARCHIVE ]] || fail "--archive '$ARCHIVE'" "there is no such file" "make it with git archive --format=tar.gz"
  VENV=${VENV:-$DIR/venv}
  ((INSTALL)) || [[ -x $VENV/bin/zip-rc ]] || fail "--venv '$VENV'" "it holds no bin/zip-rc, and --no-install installs none" \
    "name a virtual environment that has it"
  [[ $RUN_DIR != gs:* ]] || matches --run-dir "$RUN_DIR" "$BUCKET_PATH" \
    "it is no directory in a bucket (whose names are in small letters)" "write gs://BUCKET/PATH"
}

# A worker that runs in DIR and is not this one.
running() {
  local pid
  [[ -r $DIR/pid ]] || return
  pid=$(<"$DIR/pid")
  [[ $pid != "$$" && $(ps -o args= -p "$pid" 2>/dev/null) == *tpu_worker.sh* ]]
}

report_status() {
  local found=none try
  for try in 1 2 3; do
    if running; then
      found=running
    elif [[ -r $DIR/status ]]; then
      found=$(<"$DIR/status")
    elif [[ -e $DIR/command ]]; then
      found=lost
      # A process that is just being started has no arguments for a moment.
      ((try == 3)) || sleep 0.3
      continue
    fi
    break
  done
  printf 'zip_rc_status: %s\n' "$found"
}

# note NAME TEXT: a file of one line in DIR. Written to a temporary name first: whoever reads it finds it whole.
note() {
  printf '%s\n' "$2" >"$DIR/$1.$$"
  mv "$DIR/$1.$$" "$DIR/$1"
}

# shellcheck disable=SC2329 # a trap calls it
leave_status() {
  note status "$1"
  say "finished with status $1"
}

install() {
  local wanted=$PACKAGE again=0 pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  ! reinstalls "$PACKAGE" "$VENV" || again=1
  make_venv "$VENV" ''
  if [[ -n $ARCHIVE ]]; then
    perform rm -rf "$DIR/src"
    perform mkdir "$DIR/src"
    perform tar -xzf "$ARCHIVE" -C "$DIR/src"
    wanted="$DIR/src[tpu]"
  fi
  say "installing $wanted"
  perform "${pip[@]}" "$wanted"
  ((!again)) || perform "${pip[@]}" --force-reinstall --no-deps "$wanted"
}

# As in https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt list=/etc/apt/sources.list.d/gcsfuse.list
  say "installing gcsfuse"
  perform bash -c "set -o pipefail; curl -fsSL $packages/doc/apt-key.gpg | sudo tee $key >/dev/null"
  perform bash -c "echo \"deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -c -s) main\" | sudo tee $list >/dev/null"
  perform sudo apt-get update -qq
  # On a new machine the system's own updates hold the lock for a while.
  perform sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcsfuse
}

# zip-rc reads and writes files, so a bucket becomes a directory. Checkpoints are renamed into place, which gcsfuse allows for
# directories only up to a limit; and what one worker wrote the others must see at once, so nothing about files is cached.
mount_run_dir() {
  local path=${RUN_DIR#gs://}
  local bucket=${path%%/*}
  local mount=$DIR/gcs/$bucket
  if ! mountpoint -q "$mount" 2>/dev/null; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    perform mkdir -p "$mount"
    perform gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "$bucket" "$mount"
  fi
  RUN_DIR=$mount/${path#*/}
  perform mkdir -p "$RUN_DIR"
}

train() {
  local child='' status again=0
  # On a Cloud TPU, jax.distributed.initialize() finds coordinator, process count and process id in the metadata of the machine,
  # so there is nothing to pass on but the platform; named, it is an error not to find it, instead of a slow run on CPU.
  local command=(env PYTHONUNBUFFERED=1)
  case $PLATFORM in
    '') ;;
    cpu) command+=(JAX_PLATFORMS=cpu) ;;
    *) command+=("JAX_PLATFORMS=$PLATFORM,cpu") ;;
  esac
  command+=("$VENV/bin/zip-rc" train "$CONFIG" --stage "$STAGE")
  [[ -z $RUN_DIR ]] || command+=("run_dir=$RUN_DIR")
  command+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})
  if ((DRY_RUN)); then
    quote "${command[@]}"
    return
  fi
  say "$(quote "${command[@]}")"
  # A machine that is taken away ends its processes with SIGTERM; zip-rc then saves its state.
  trap 'again=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  "${command[@]}" &
  child=$!
  if ((again)); then # the signal came before the child had a number
    kill -TERM "$child" 2>/dev/null || true
    again=0
  fi
  while :; do
    status=0
    wait "$child" || status=$?
    ((again)) || break
    again=0 # it was the signal that ended the wait
  done
  return "$status"
}

work() {
  if ((INSTALL)); then
    install
  fi
  if [[ $RUN_DIR == gs:* ]]; then
    mount_run_dir
  fi
  train
}

main() {
  parse "$@"
  if ((STATUS)); then
    report_status
    return
  fi
  validate
  if ((DRY_RUN)); then
    [[ $DIR == /* ]] || DIR=$PWD/$DIR
    say "these commands would run"
    work
    return
  fi
  local command
  command=$(quote "$CONFIG" "$STAGE" "$RUN_DIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
  mkdir -p "$DIR"
  DIR=$(cd "$DIR" && pwd)
  if running; then
    if ((DETACH)) && [[ $(<"$DIR/command") == "$command" ]]; then
      say "this already runs in $DIR (process $(<"$DIR/pid"))"
      return
    fi
    fail "directory $DIR" "another training runs there ($(<"$DIR/command"), process $(<"$DIR/pid"))" \
      "wait for it, end it with kill $(<"$DIR/pid"), or use another --dir"
  fi
  rm -f "$DIR/status"
  note command "$command"
  if ((DETACH)); then
    local again=() word
    for word in "$@"; do
      [[ $word == --detach ]] || again+=("$word")
    done
    [[ ! -e $DIR/log ]] || mv "$DIR/log" "$DIR/log.old"
    setsid nohup bash "$HERE/$PROGRAM" "${again[@]}" >"$DIR/log" 2>&1 </dev/null &
    note pid "$!"
    say "started in the background, log in $DIR/log"
    return
  fi
  note pid "$$"
  trap 'leave_status $?' EXIT
  work
}

# bash reads a script while it runs it, and tpu_train.sh, called again, copies a new one over this: with `exit` on the same line nothing
# more is read after main.
main "$@"; exit
