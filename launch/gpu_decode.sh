#!/usr/bin/env bash
# Decodes a file of prompts on this machine's NVIDIA GPU: install, check, run. See --help.
set -euo pipefail
PROGRAM=gpu_decode.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# shellcheck source=launch/common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Answers a file of prompts with the adaptive search on an NVIDIA GPU: makes a virtual environment, installs zip_rc_jax with CUDA into it,
checks driver and GPU, and runs `zip-rc decode`. Programs that XLA compiled are kept, so a second run starts at once. Results are kept as
they come: after an interruption the same command decodes only what is missing.

  launch/gpu_decode.sh MODEL --input FILE --output DIR [option ...] [option=value ...] [-- ZIP_RC_OPTION ...]

  MODEL                 checkpoint or training directory, Hugging Face directory or model id, GGUF file, or embedded:NAME
  --input FILE          JSONL file with `question` or `problem`, and optionally `answer` (INPUT)
  --output DIR          directory for results.jsonl and metadata.json (OUTPUT)
  --venv DIR            virtual environment, made if it does not exist; default ~/.cache/zip_rc_jax/venv-cuda (VENV)
  --python PYTHON       interpreter to make it with; default the first of python3.13, 3.12, 3.11 and python3 (PYTHON)
  --package SPEC        pip-install this instead of this checkout (PACKAGE), for example
                        'zip-rc-jax[cuda] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'
  --no-install          use the virtual environment as it is
  --mem-fraction X      part of the GPU's memory that JAX takes at the start, default 0.9 (XLA_CLIENT_MEM_FRACTION, or its old name
                        XLA_PYTHON_CLIENT_MEM_FRACTION)
  --cache-dir DIR       where compiled programs are kept, default ~/.cache/zip_rc_jax/xla (JAX_COMPILATION_CACHE_DIR). Only for
                        directories that nobody else can write to: JAX runs what it finds there
  --any-driver          go on with a driver older than CUDA 13 wants (for NVIDIA's forward compatibility packages)
  --dry-run             print the commands, one a line, as they can be pasted into a shell, and run nothing
  option=value          fields of DecodeConfig, for example n=8 alpha=0.1 beta=0.02
  -- ZIP_RC_OPTION ...  further options of `zip-rc decode`, for example -- --chat --seed 3

Names in parentheses are environment variables; an option wins over them. XLA_FLAGS and CUDA_VISIBLE_DEVICES pass through.
Exit status: that of zip-rc; 2 for bad input.

examples:
  # see what would happen
  launch/gpu_decode.sh runs/smollm2_135m/final --input problems.jsonl --output decoded n=8 alpha=0.1 --dry-run
  # an exported model with its chat template, on the second GPU
  CUDA_VISIBLE_DEVICES=1 launch/gpu_decode.sh exported/smollm2-zip --input problems.jsonl --output decoded n=8 beta=0.02 -- --chat
TEXT
}

MIN_DRIVER=580 # for CUDA 13: https://docs.jax.dev/en/latest/installation.html
MODEL='' OVERRIDES=() FURTHER=() INSTALL=1 ANY_DRIVER=0 DRY_RUN=0
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/zip_rc_jax
INPUT=${INPUT:-} OUTPUT=${OUTPUT:-} VENV=${VENV:-$CACHE/venv-cuda} PYTHON=${PYTHON:-} PACKAGE=${PACKAGE:-}
MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}}
CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$CACHE/xla}

parse() {
  split_options "$@"
  set -- ${WORDS[@]+"${WORDS[@]}"}
  while (($#)); do
    case $1 in
      --input | --output | --venv | --python | --package | --mem-fraction | --cache-dir)
        (($# >= 2)) || fail "option $1" "it needs a value" "see --help"
        case $1 in
          --input) INPUT=$2 ;;
          --output) OUTPUT=$2 ;;
          --venv) VENV=$2 ;;
          --python) PYTHON=$2 ;;
          --package) PACKAGE=$2 ;;
          --mem-fraction) MEM_FRACTION=$2 ;;
          --cache-dir) CACHE_DIR=$2 ;;
        esac
        shift
        ;;
      --no-install) INSTALL=0 ;;
      --any-driver) ANY_DRIVER=1 ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) usage && exit ;;
      --)
        shift
        FURTHER=("$@")
        break
        ;;
      *)
        if [[ -z $MODEL && $1 != -* ]]; then
          MODEL=$1
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
  check_characters "$MODEL" "$INPUT" "$OUTPUT" "$VENV" "$PYTHON" "$PACKAGE" "$MEM_FRACTION" "$CACHE_DIR" \
    ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${FURTHER[@]+"${FURTHER[@]}"}
  [[ -n $MODEL ]] || fail "MODEL" "it is not given" "name a training directory, a Hugging Face model, a GGUF file or embedded:chain_sum_zip"
  # A Hugging Face model id has exactly one slash, and is no path of this machine.
  [[ -e $MODEL || $MODEL == embedded:?* || $MODEL =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$ && $MODEL != *.gguf ]] ||
    fail "model '$MODEL'" "there is no such file or directory, and it is no model id" "correct the path, or write ORGANISATION/NAME"
  [[ -n $INPUT ]] || fail "INPUT" "it is not set" "set --input to a JSONL file with \`question\` or \`problem\` in every line"
  [[ -f $INPUT && -s $INPUT ]] || fail "INPUT='$INPUT'" "there is no such file, or it is empty" "pass a JSONL file"
  [[ -n $OUTPUT ]] || fail "OUTPUT" "it is not set" "set --output to a directory for the results"
  [[ ! -e $OUTPUT || -d $OUTPUT ]] || fail "OUTPUT='$OUTPUT'" "it is a file" "name a directory"
  [[ $MEM_FRACTION =~ ^(0?\.[0-9]*[1-9][0-9]*|1|1\.0*)$ ]] || fail "XLA_CLIENT_MEM_FRACTION='$MEM_FRACTION'" \
    "it is a part of the GPU's memory" "use a number above 0 and at most 1, for example 0.9"
  [[ -z $PACKAGE || $PACKAGE == *"[cuda"* ]] || fail "PACKAGE='$PACKAGE'" "without the extra [cuda] JAX would not find the GPU" \
    "write it as 'zip-rc-jax[cuda] @ git+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'"
  ((INSTALL)) || [[ -x $VENV/bin/zip-rc ]] || fail "VENV='$VENV'" "it holds no bin/zip-rc, and --no-install installs none" \
    "name a virtual environment that has it"
  if ((INSTALL)) && [[ ! -x $VENV/bin/python ]]; then
    check_python
  fi
  ((DRY_RUN)) || check_gpu
}

check_python() {
  if [[ -n $PYTHON ]]; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null ||
      fail "PYTHON='$PYTHON'" "zip_rc_jax needs Python 3.11, 3.12 or 3.13, and this is none of them or does not start" "name another one"
  else
    PYTHON=$(find_python) || fail "Python" "zip_rc_jax needs 3.11, 3.12 or 3.13, and none was found" "install one, or set --python"
  fi
}

GPU=(nvidia-smi '--query-gpu=name,driver_version,memory.total' '--format=csv,noheader')

check_gpu() {
  local found driver
  command -v nvidia-smi >/dev/null || fail "nvidia-smi" "it is not installed, or not on PATH, so there is no NVIDIA driver" \
    "install the driver, or run this on a machine with a GPU, or add --dry-run"
  found=$("${GPU[@]}" 2>&1) && [[ -n $found ]] || fail "nvidia-smi" "it finds no GPU (${found//$'\n'/ })" \
    "see that the driver is loaded, and that a container was given the GPU"
  say "${found//$'\n'/; }"
  driver=${found#*, }
  driver=${driver%%.*}
  [[ $driver =~ ^[0-9]+$ ]] || return 0
  ((driver >= MIN_DRIVER || ANY_DRIVER)) || fail "NVIDIA driver $driver" "CUDA 13 needs $MIN_DRIVER or newer" \
    "update the driver, or add --any-driver if NVIDIA's forward compatibility packages are installed"
}

build_commands() {
  MAKE_VENV=()
  [[ -x $VENV/bin/python ]] || MAKE_VENV=("$PYTHON" -m venv "$VENV")
  PIP=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  REINSTALL=()
  if reinstalls "$PACKAGE" "$VENV"; then
    REINSTALL=("${PIP[@]}" --force-reinstall --no-deps "$PACKAGE")
  fi
  if [[ -n $PACKAGE ]]; then PIP+=("$PACKAGE"); else PIP+=(--editable "${ROOT}[cuda]"); fi
  # With the platform named, it is an error not to find the GPU, instead of a slow run on CPU. The old name of the memory fraction
  # must not be set beside the new one.
  SETTINGS=(env -u XLA_PYTHON_CLIENT_MEM_FRACTION "XLA_CLIENT_MEM_FRACTION=$MEM_FRACTION" "JAX_PLATFORMS=cuda,cpu"
    "JAX_COMPILATION_CACHE_DIR=$CACHE_DIR" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3)
  CHECK=("${SETTINGS[@]}" "$VENV/bin/python" -c 'import jax; print(jax.devices())')
  DECODE=("${SETTINGS[@]}" "$VENV/bin/zip-rc" decode "$MODEL" --input "$INPUT" --output "$OUTPUT"
    ${OVERRIDES[@]+"${OVERRIDES[@]}"} ${FURTHER[@]+"${FURTHER[@]}"})
}

print_commands() {
  if ((INSTALL)); then
    ((${#MAKE_VENV[@]} == 0)) || quote "${MAKE_VENV[@]}"
    quote "${PIP[@]}"
    ((${#REINSTALL[@]} == 0)) || quote "${REINSTALL[@]}"
  fi
  quote "${GPU[@]}"
  quote "${CHECK[@]}"
  quote "${DECODE[@]}"
}

main() {
  parse "$@"
  validate
  build_commands
  if ((DRY_RUN)); then
    print_commands
    return
  fi
  if ((INSTALL)); then
    if ((${#MAKE_VENV[@]})); then
      make_venv "$VENV" "$PYTHON"
    fi
    say "$(quote "${PIP[@]}")"
    "${PIP[@]}"
    if ((${#REINSTALL[@]})); then
      say "$(quote "${REINSTALL[@]}")"
      "${REINSTALL[@]}"
    fi
  fi
  "${CHECK[@]}" || fail "JAX" "it does not find the GPU that nvidia-smi shows (see above)" \
    "install jax[cuda13] of the right version into $VENV, or delete it and run this again without --no-install"
  say "$(quote "${DECODE[@]}")"
  exec "${DECODE[@]}"
}

# bash reads a script while it runs it: with `exit` on the same line nothing more is read after main, should the file have changed.
main "$@"; exit
