# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run. Each of them sets PROGRAM first.

# Bad input: one paragraph with value, reason and fix, as `zip-rc` writes it, and status 2.
fail() {
  printf '%s: %s: %s. Fix: %s.\n' "$PROGRAM" "$1" "$2" "$3" >&2
  exit 2
}

# A line for the person who watches. Standard output is for logs and, in dry runs, for commands.
say() {
  printf '%s: %s\n' "$PROGRAM" "$*" >&2
}

# The arguments as one line that a shell reads back as the same words.
quote() {
  local LC_ALL=C word line='' out
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out=$word
    else
      out=''
      while [[ $word == *\'* ]]; do
        out+="'${word%%\'*}'\\'"
        word=${word#*\'}
      done
      out+="'$word'"
    fi
    line+="${line:+ }$out"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it where this is a dry run.
perform() {
  if ((DRY_RUN)); then quote "$@"; else "$@"; fi
}

# one_of NAME VALUE ALLOWED...
one_of() {
  local name=$1 value=$2 allowed
  shift 2
  for allowed in "$@"; do
    [[ $value == "$allowed" ]] && return
  done
  local IFS='|'
  fail "$name='$value'" "it must be one of $*" "choose one of them"
}

# matches NAME VALUE PATTERN REASON FIX
matches() {
  local LC_ALL=C
  [[ -n $2 ]] || fail "$1" "it is not set" "$5"
  [[ $2 =~ ^$3$ ]] || fail "$1='$2'" "$4" "$5"
}

# shellcheck disable=SC2034 # used by the scripts
BUCKET_PATH='gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/..*'

check_stage() {
  [[ -n $1 ]] || fail "--stage" "it is not set" "add --stage policy, critic, final or lite"
  one_of --stage "$1" policy critic final lite
}

check_config() {
  [[ -n $1 ]] || fail "CONFIG" "it is not given" "name a YAML file, for example configs/chain_sum.yaml"
  [[ -f $1 && -r $1 ]] || fail "config '$1'" "there is no such file" "pass one of the files in configs/"
}

# A file name or setting with a line break in it could not be printed as one line, and is a slip of the keyboard.
check_characters() {
  local word
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "$(printf '%q' "$word")" "it holds a control character" "leave it out"
  done
}

# check_override WORD: positional arguments after the first are settings for zip-rc.
check_override() {
  [[ $1 != -* ]] || fail "option '$1'" "this script does not know it" "see --help"
  [[ $1 == ?*=* ]] || fail "argument '$1'" "settings have the form section.key=value" "write for example critic.steps=2000"
}

# Sets WORDS to the arguments with `--name=value` cut in two, up to a `--`.
split_options() {
  WORDS=()
  while (($#)); do
    case $1 in
      --) WORDS+=("$@") && return ;;
      --*=*) WORDS+=("${1%%=*}" "${1#*=}") ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
}

# reinstalls SPEC VENV: whether SPEC may be of other code than VENV holds, under the same version. pip then installs it only if it is told.
# A new environment holds nothing, and of a directory or a version of an index pip knows.
reinstalls() {
  [[ $1 == *://* && -x $2/bin/python ]]
}

# The first Python that zip_rc_jax runs on, or status 1.
find_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      printf '%s\n' "$python"
      return
    fi
  done
  return 1
}

# make_venv DIR PYTHON: a virtual environment with pip, unless DIR already is one. PYTHON may be empty: then the first one that is
# new enough, and where there is none (TPU images ship Python 3.10), one that uv fetches.
make_venv() {
  local venv=$1 python=$2
  if [[ -x $venv/bin/python ]]; then
    return
  fi
  if [[ -n $python ]] || python=$(find_python); then
    if perform "$python" -m venv "$venv"; then
      return
    fi
    say "'$python -m venv' failed (Debian and Ubuntu keep it in a package of its own); trying uv"
    rm -rf "$venv"
  fi
  if ! perform python3 -m pip install --quiet --disable-pip-version-check --target "$venv.uv" uv; then
    fail "Python" "zip_rc_jax needs Python 3.11, 3.12 or 3.13 with venv, there is none, and uv could not be installed to fetch one" \
      "install python3.12 and python3.12-venv"
  fi
  perform "$venv.uv/bin/uv" venv --seed --python '>=3.11,<3.14' "$venv"
}
