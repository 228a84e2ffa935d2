"""The launch scripts as users run them: printed commands, refusals, a TPU that is taken away, and
the worker on this machine.

No test can reach a real gcloud: PATH holds links to the tools that the scripts may use, and fakes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from zip_rc_jax.config.files import load_config
from zip_rc_jax.data.rollouts import write_rollouts
from zip_rc_jax.data.worked_solutions import vocabulary
from zip_rc_jax.models.io.tokenizer import word_level
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.policy import LARGEST_NUMBER, solution_rollouts

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = (
    "bash basename cat cp cut dirname env git grep gzip head kill ln ls mkdir mktemp mv nohup ps "
    "rm rmdir sed setsid sleep tail tar tee"
    " touch wc"
)
SCRIPTS = ("tpu_train.sh", "tpu_worker.sh", "gpu_decode.sh")

# A Cloud TPU in a directory $FAKE. `lives/N` lists what the TPU that the N-th create command makes
# is in, one state for each time that it is asked for; the last one stays, and "STATE until FILE"
# stays until FILE exists. "STATE USER" is one that USER initiated. Every worker is a directory
# under homes/.
GCLOUD = r"""#!/usr/bin/env bash
set -u
printf '%s\x1f' "$@" >>"$FAKE/calls"
echo >>"$FAKE/calls"
[[ ! -e $FAKE/forbidden ]] || { echo "ERROR: (gcloud) PERMISSION_DENIED: forbidden" >&2; exit 1; }

next_state() {
  local file
  while :; do
    [[ -s $FAKE/states ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'nodes/x' was not found." >&2; exit 1; }
    read -r state word file <"$FAKE/states"
    [[ $word == until && -e $FAKE/$file ]] || break
    sed -i 1d "$FAKE/states"
  done
  [[ $word == until || $(wc -l <"$FAKE/states") == 1 ]] || sed -i 1d "$FAKE/states"
  echo "$state" >"$FAKE/last"
}

wipe() {
  local pid
  for pid in "$FAKE"/homes/*/zip_rc_launch/pid; do
    [[ ! -e $pid ]] || kill -KILL -- "-$(cat "$pid")" 2>/dev/null
  done
  rm -rf "$FAKE/homes" "$FAKE/states"
}

option() { # the value of --NAME=VALUE among the rest
  local name=$1 word
  shift
  for word in "$@"; do [[ $word != "--$name="* ]] || echo "${word#*=}"; done
}

homes() {
  if [[ $1 == all ]]; then ls -d "$FAKE"/homes/*; else echo "$FAKE/homes/$1"; fi
}

case "$3 $4" in
  *create)
    if [[ -e $FAKE/full ]]; then
      rm "$FAKE/full"
      echo "ERROR: (gcloud) There is no more capacity in the zone" >&2
      exit 1
    fi
    life=$(($(cat "$FAKE/life" 2>/dev/null || echo 0) + 1))
    echo "$life" >"$FAKE/life"
    cp "$FAKE/lives/$life" "$FAKE/states"
    for worker in $WORKERS; do
      mkdir -p "$FAKE/homes/$worker/zip_rc_launch/venv"
      ln -s "$FAKE/venv_bin" "$FAKE/homes/$worker/zip_rc_launch/venv/bin"
    done
    ;;
  "queued-resources describe")
    next_state
    [[ $word != until ]] || word=''
    printf '%s\t%s\n' "$state" "$word"
    ;;
  "tpu-vm describe")
    [[ -e $FAKE/queued ]] || next_state
    state=$(cat "$FAKE/last")
    [[ $state != ACTIVE ]] || state=READY
    printf '%s\tv6e-8\n' "$state"
    ;;
  *delete) wipe ;;
  "tpu-vm ssh")
    grep -qE 'ACTIVE|READY' "$FAKE/last" && [[ ! -e $FAKE/unreachable ]] || exit 255
    status=0
    for home in $(homes "$(option worker "$@")"); do
      out=$(cd "$home" && HOME=$home bash -c "$(option command "$@")" && echo x) || { status=$?; continue; }
      printf '%s' "${out%x}" | tee -a "$FAKE/shown"
    done
    exit $status
    ;;
  "tpu-vm scp")
    shift 4
    files=()
    while [[ $1 != --* ]]; do files+=("$1"); shift; done
    last=$((${#files[@]} - 1))
    for home in $(homes "$(option worker "$@")"); do
      cp "${files[@]:0:last}" "$home/${files[last]#*:}"
    done
    ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""  # noqa: E501

GCSFUSE = r"""#!/usr/bin/env bash
printf '%s\x1f' "$@" >>"$FAKE/mounts"
echo >>"$FAKE/mounts"
bucket=${*: -2:1} mount=${*: -1}
[[ -L $mount ]] || { rmdir "$mount" && mkdir -p "$FAKE/buckets/$bucket" && ln -s "$FAKE/buckets/$bucket" "$mount"; }
"""  # noqa: E501

ZIP_RC = r"""#!/usr/bin/env bash
# A line is one write, since the workers share the file.
echo "$(printf '%s\x1f' "$@")${JAX_PLATFORMS:-}" >>"$FAKE/trainings"
echo "${ZIP_RC_COMMIT:-}" >>"$FAKE/commits"
for word in "$@"; do [[ $word != run_dir=* ]] || run=${word#*=}; done
worker=$(basename "$HOME")
. "$FAKE/training"
"""

PIP = r"""#!/usr/bin/env bash
echo "$(printf '%s\x1f' "$@")" >>"$FAKE/installs"
"""

FORBIDDEN = r"""#!/usr/bin/env bash
echo "$0 $*" >>"$FAKE/forbidden_calls"
exit 97
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def records(path):
    """The lines of a log of arguments."""
    return (
        [line.rstrip("\x1f").split("\x1f") for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """A directory for PATH with what the scripts need and neither gcloud nor a driver."""
    directory = tmp_path_factory.mktemp("tools")
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, name
        (directory / name).symlink_to(found)
    return directory


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A git checkout with the scripts, a config, and nothing else."""
    directory = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", directory / "launch")
    (directory / "mine.yaml").write_text("run_dir: runs/mine\n")
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "x")):
        subprocess.run(["git", *command], cwd=directory, check=True)
    return directory


def commit_of(checkout):
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True
    ).stdout.strip()


class Machine:
    """This machine as the scripts see it: a PATH, a home, an environment, and the fake cloud."""

    def __init__(self, tools, checkout, directory):
        self.fake, self.checkout = directory / "fake", checkout
        self.bin = directory / "bin"
        self.started: list[subprocess.Popen] = []
        for path in (self.fake / "lives", self.bin, directory / "home"):
            path.mkdir(parents=True)
        self.env = {
            "PATH": f"{self.bin}:{tools}",
            "HOME": str(directory / "home"),
            "FAKE": str(self.fake),
            "WORKERS": "0",
        }

    def run(self, script, *arguments, timeout=30, **env):
        command = [str(self.checkout / "launch" / script), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=self.checkout,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def start(self, script, *arguments):
        """The same in the background; `shown()` of the process is what it has printed so far."""
        path = self.fake / f"output-{time.monotonic_ns()}"
        # What runs in the background of a script ignores SIGINT and hands that on; a user's
        # terminal does not.
        command = [
            shutil.which("env"),
            "--default-signal=INT",
            str(self.checkout / "launch" / script),
            *map(str, arguments),
        ]
        with path.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.checkout,
                env=self.env,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        process.shown = path.read_text
        self.started.append(process)
        return process

    def cloud(self, *lives, training, workers=1, queue=True):
        """Puts the fake cloud on PATH; `training` is what zip-rc does on a worker."""
        for name, text in (
            ("gcloud", GCLOUD),
            ("gcsfuse", GCSFUSE),
            ("mountpoint", "#!/usr/bin/env bash\nexit 1\n"),
        ):
            write_script(self.bin / name, text)
        write_script(self.fake / "venv_bin" / "zip-rc", ZIP_RC)
        write_script(self.fake / "venv_bin" / "python", PIP)
        (self.fake / "training").write_text(training)
        for number, states in enumerate(lives, 1):
            (self.fake / "lives" / str(number)).write_text("".join(s + "\n" for s in states))
        self.env["WORKERS"] = " ".join(map(str, range(workers)))
        if queue:
            (self.fake / "queued").touch()

    @property
    def calls(self):
        return records(self.fake / "calls")

    def verbs(self):
        """What gcloud was asked to do, without the looks at states, logs and statuses."""
        found = []
        for call in self.calls:
            verb = f"{call[2]} {call[3]}"
            command = next((w for w in call if w.startswith("--command=")), "")
            if "describe" not in verb and "tail -c" not in command and "--status" not in command:
                found.append(
                    verb
                    + (
                        " mkdir"
                        if "mkdir" in command
                        else " start"
                        if "--detach" in command
                        else ""
                    )
                )
        return found


@pytest.fixture
def machine(tools, checkout, tmp_path):
    machine = Machine(tools, checkout, tmp_path)
    yield machine
    for process in machine.started:
        process.kill()
        process.wait()
    for pid in tmp_path.rglob("pid"):
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


WHERE = ("--name", "zip", "--zone", "us-east5-b", "--type", "v6e-8")
BUCKET = ("--run-dir", "gs://bucket/a/run")
FAST = ("--poll", "0.02", "--wait", "20")
DEPLOY = ["tpu-vm ssh mkdir", "tpu-vm scp", "tpu-vm ssh start"]


# Help, syntax.


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_with_two_examples_and_names_every_option(script, machine):
    found = machine.run(script, "--help")
    assert found.returncode == 0
    examples = found.stdout.split("\nexamples:\n")[1]
    assert examples.count("  # ") == 2
    assert examples.count(f"launch/{script} ") == 2
    text = (ROOT / "launch" / script).read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", text.split("parse() {")[1].split("\n}\n")[0])) - {
        "--help"
    }
    assert len(options) >= 9
    for option in options:
        assert f"  {option} " in found.stdout


@pytest.mark.parametrize("example", SCRIPTS)
def test_the_first_example_of_the_help_works_as_it_stands(example, machine):
    line = (
        machine.run(example, "--help")
        .stdout.split("\nexamples:\n")[1]
        .splitlines()[1]
        .replace("BUCKET", "bucket")
    )
    words = shlex.split(line)
    for word in words:
        if word.endswith((".jsonl", ".yaml")) or word.startswith("runs/"):
            path = machine.fake / word
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x\n")
    env = machine.env | {"PATH": f"{machine.env['PATH']}:{pathlib.Path(sys.executable).parent}"}
    command = [str(machine.checkout / words[0]), *words[1:]]
    found = subprocess.run(command, cwd=machine.fake, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_scripts_hold_no_ones_own_names():
    for script in (ROOT / "launch").iterdir():
        for word in ("/home/", "/root", "/Users/", "/work/", "@gmail", "gs://zip"):
            assert word not in script.read_text(), (script, word)


def test_no_advice_needs_the_package_to_be_on_pypi():
    files = [*(ROOT / "launch").iterdir(), *(ROOT / "zip_rc_jax" / "aot").glob("*.py")]
    advice = [
        line for file in files for line in file.read_text().splitlines() if "zip-rc-jax[" in line
    ]
    assert len(advice) >= 6
    for line in advice:
        assert re.search(
            r"'zip-rc-jax\[(tpu|cuda)\] @ git\+https://HOST/ORGANISATION/zip_rc_jax@COMMIT'", line
        ), line


def test_every_script_passes_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    files = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    found = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_changes_while_it_runs_ends_as_it_began(script, machine, tmp_path):
    """tpu_train.sh, called again, copies tpu_worker.sh over the one that runs, and `git pull` may
    change all of them."""
    shutil.copytree(machine.checkout, tmp_path / "copy")
    machine.checkout = tmp_path / "copy"
    change = (
        f"echo 'touch $FAKE/intruded' >>{machine.checkout}/launch/{script}; touch $FAKE/changed\n"
    )
    (machine.fake / "in.jsonl").write_text("{}\n")
    write_script(machine.bin / "python3.12", "#!/usr/bin/env bash\n" + change)
    machine.cloud(("ACTIVE",), training=change)
    arguments = {
        "tpu_train.sh": ("mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST),
        "tpu_worker.sh": (
            "mine.yaml",
            "--stage",
            "final",
            "--dir",
            tmp_path / "w",
            "--venv",
            tmp_path / "venv",
            "--no-install",
        ),
        "gpu_decode.sh": (
            "embedded:x",
            "--input",
            machine.fake / "in.jsonl",
            "--output",
            "out",
            "--python",
            "python3.12",
            "--dry-run",
        ),
    }[script]
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "bin").symlink_to(machine.fake / "venv_bin")
    found = machine.run(script, *arguments)
    assert found.returncode == 0, found.stderr
    assert (machine.fake / "changed").exists()
    assert not (machine.fake / "intruded").exists()


# Dry runs: exact commands, nothing run.

TPU = "gcloud compute tpus"
SSH = f"{TPU} tpu-vm ssh zip --zone=us-east5-b --quiet --worker"
WORKER = "bash tpu_worker.sh mine.yaml --stage"
FOLLOW = [
    f"{SSH}=all '--command=bash zip_rc_launch/tpu_worker.sh --status --dir zip_rc_launch'",
    f"{SSH}=0 '--command=tail -c +1 zip_rc_launch/log'",
]
TPU_DRY_RUNS = {
    "queue": (
        ("mine.yaml", "--stage", "final", *WHERE, *BUCKET),
        {},
        [
            "mkdir -p HOME/.cache/zip_rc_jax/launch/zip",
            "git -C ROOT archive --format=tar.gz "
            "--output=HOME/.cache/zip_rc_jax/launch/zip/code.tar.gz HEAD",
            f"{TPU} queued-resources create zip --zone=us-east5-b --node-id=zip "
            "--accelerator-type=v6e-8"
            " --runtime-version=v2-alpha-tpuv6e --valid-until-duration=21600s",
            f"{TPU} queued-resources describe zip --zone=us-east5-b "
            "'--format=value(state.state,state.stateInitiator)'",
            f"{TPU} tpu-vm describe zip --zone=us-east5-b '--format=value(state,acceleratorType)'",
            f"{SSH}=all '--command=mkdir -p zip_rc_launch'",
            f"{TPU} tpu-vm scp ROOT/launch/tpu_worker.sh ROOT/launch/common.sh mine.yaml "
            "HOME/.cache/zip_rc_jax/launch/zip/code.tar.gz"
            " zip:zip_rc_launch/ --zone=us-east5-b --quiet --worker=all",
            f"{SSH}=all '--command=cd zip_rc_launch && env ZIP_RC_COMMIT=COMMIT {WORKER} final "
            "--dir . --platform tpu --detach"
            " --archive code.tar.gz"
            " --run-dir gs://bucket/a/run'",
            *FOLLOW,
        ],
    ),
    "at once, spot, a package, deleted, settings": (
        (
            *(
                "mine.yaml",
                "critic.steps=20",
                "--stage=critic",
                *WHERE,
                "--no-queue",
                "--spot",
                "--no-resume",
                "--run-dir=/mnt/disk/run",
            ),
            *(
                "--package",
                "zip-rc-jax[tpu] @ git+https://h/o/zip_rc_jax@1a2b",
                "--delete-when-done",
                "critic.batch_rows=2",
            ),
        ),
        {},
        [
            f"{TPU} tpu-vm create zip --zone=us-east5-b --accelerator-type=v6e-8 "
            "--version=v2-alpha-tpuv6e --spot",
            f"{TPU} tpu-vm describe zip --zone=us-east5-b '--format=value(state,acceleratorType)'",
            f"{SSH}=all '--command=mkdir -p zip_rc_launch'",
            f"{TPU} tpu-vm scp ROOT/launch/tpu_worker.sh ROOT/launch/common.sh mine.yaml "
            "zip:zip_rc_launch/"
            " --zone=us-east5-b --quiet --worker=all",
            f"{SSH}=all '--command=cd zip_rc_launch && {WORKER} critic --dir . --platform tpu "
            "--detach --package"
            r" '\''zip-rc-jax[tpu] @ git+https://h/o/zip_rc_jax@1a2b'\'' --run-dir /mnt/disk/run "
            r"critic.steps=20 critic.batch_rows=2'",
            *FOLLOW,
            f"{TPU} tpu-vm delete zip --zone=us-east5-b --quiet",
        ],
    ),
    "environment and further flags": (
        (
            "mine.yaml",
            "--package=zip-rc-jax[tpu]",
            "--wait=600",
            "--create-flag=--network=n",
            "--ssh-flag=--internal-ip",
            "--type=v5p-8",
        ),
        {
            "TPU_NAME": "t",
            "TPU_ZONE": "europe-west4-b",
            "TPU_TYPE": "v4-8",
            "GCP_PROJECT": "some-project",
            "RUN_DIR": "gs://b-1/r",
        }
        | {"STAGE": "lite", "TPU_SPOT": "1", "DELETE_WHEN_DONE": "1"},
        [
            f"{TPU} queued-resources create t --zone=europe-west4-b --project=some-project "
            "--node-id=t --accelerator-type=v5p-8"
            " --runtime-version=v2-alpha-tpuv5 --valid-until-duration=600s --spot --network=n",
            f"{TPU} queued-resources describe t --zone=europe-west4-b --project=some-project"
            " '--format=value(state.state,state.stateInitiator)'",
            f"{TPU} tpu-vm describe t --zone=europe-west4-b --project=some-project "
            "'--format=value(state,acceleratorType)'",
            *(
                f"{TPU} tpu-vm {rest}"
                for rest in (
                    "ssh t --zone=europe-west4-b --project=some-project --quiet --internal-ip "
                    "--worker=all"
                    " '--command=mkdir -p zip_rc_launch'",
                    "scp ROOT/launch/tpu_worker.sh ROOT/launch/common.sh mine.yaml "
                    "t:zip_rc_launch/ --zone=europe-west4-b"
                    " --project=some-project --quiet --internal-ip --worker=all",
                    "ssh t --zone=europe-west4-b --project=some-project --quiet --internal-ip "
                    "--worker=all '--command=cd zip_rc_launch &&"
                    rf" {WORKER} lite --dir . --platform tpu --detach --package "
                    r"'\''zip-rc-jax[tpu]'\'' --run-dir gs://b-1/r'",
                    "ssh t --zone=europe-west4-b --project=some-project --quiet --internal-ip "
                    "--worker=all"
                    " '--command=bash zip_rc_launch/tpu_worker.sh --status --dir zip_rc_launch'",
                    "ssh t --zone=europe-west4-b --project=some-project --quiet --internal-ip "
                    "--worker=0"
                    " '--command=tail -c +1 zip_rc_launch/log'",
                )
            ),
            f"{TPU} queued-resources delete t --zone=europe-west4-b --project=some-project "
            "--force --quiet",
        ],
    ),
}


@pytest.mark.parametrize("case", TPU_DRY_RUNS)
def test_a_dry_run_on_a_tpu_prints_the_exact_commands_and_runs_none(case, machine):
    arguments, env, expected = TPU_DRY_RUNS[case]
    for name in ("gcloud", "ssh", "scp"):
        write_script(machine.bin / name, FORBIDDEN)
    found = machine.run("tpu_train.sh", *arguments, "--dry-run", **env)
    assert found.returncode == 0, found.stderr
    shown = found.stdout.replace(str(machine.checkout), "ROOT").replace(machine.env["HOME"], "HOME")
    shown = shown.replace(commit_of(machine.checkout), "COMMIT")
    assert shown.splitlines() == expected
    assert not (machine.fake / "forbidden_calls").exists()
    assert not list(pathlib.Path(machine.env["HOME"]).iterdir())


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_is_the_one_that_google_names_for_jax_unless_another_is_given(
    kind, runtime, machine
):
    arguments = ("mine.yaml", "--stage", "final", *WHERE, *BUCKET, "--type", kind, "--dry-run")
    assert f"--runtime-version={runtime} " in machine.run("tpu_train.sh", *arguments).stdout
    assert (
        "--runtime-version=other "
        in machine.run("tpu_train.sh", *arguments, RUNTIME_VERSION="other").stdout
    )
    assert (
        "--version=mine\n"
        in machine.run("tpu_train.sh", *arguments, "--runtime-version=mine", "--no-queue").stdout
    )


ODD = [
    "a.b=it's",
    'a.b="x y"',
    "a.b=$HOME `id` \\",
    "a.b=[1,2]",
    "a.b=*",
    "a.b=x  ;  rm -rf /",
    "a.b=",
    "a.b=!é&|<>#~",
]


def test_odd_characters_survive_both_shells(machine):
    found = machine.run(
        "tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, "--dry-run", *ODD
    )
    (line,) = (line for line in found.stdout.splitlines() if "--detach" in line)
    command = next(w for w in shlex.split(line) if w.startswith("--command=")).removeprefix(
        "--command="
    )
    assert shlex.split(command)[-len(ODD) :] == ODD


GIT = "zip-rc-jax[tpu] @ git+https://h/o/zip_rc_jax@1a2b"
WORKER_PIP = "DIR/venv/bin/python -m pip install --quiet --disable-pip-version-check"
PACKAGES, GCSFUSE_KEY = (
    "https://packages.cloud.google.com/apt",
    "/usr/share/keyrings/cloud.google.asc",
)
WORKER_DRY_RUNS = {
    "everything is missing": (
        (
            "--archive",
            "it's code.tar.gz",
            "--run-dir",
            "gs://bucket/a/run",
            "--platform",
            "tpu",
            "--detach",
            "a.b=x y",
        ),
        (),
        [
            "python3.12 -m venv DIR/venv",
            "rm -rf DIR/src",
            "mkdir DIR/src",
            r"tar -xzf 'it'\''s code.tar.gz' -C DIR/src",
            f"{WORKER_PIP} 'DIR/src[tpu]'",
            f"bash -c 'set -o pipefail; curl -fsSL {PACKAGES}/doc/apt-key.gpg | sudo tee "
            f"{GCSFUSE_KEY} >/dev/null'",
            f"""bash -c 'echo "deb [signed-by={GCSFUSE_KEY}] {PACKAGES} gcsfuse-$(lsb_release -c -s) main" |"""  # noqa: E501
            " sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null'",
            "sudo apt-get update -qq",
            "sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcsfuse",
            "mkdir -p DIR/gcs/bucket",
            "gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "
            "bucket DIR/gcs/bucket",
            "mkdir -p DIR/gcs/bucket/a/run",
            "env PYTHONUNBUFFERED=1 JAX_PLATFORMS=tpu,cpu DIR/venv/bin/zip-rc train mine.yaml "
            "--stage final run_dir=DIR/gcs/bucket/a/run"
            " 'a.b=x y'",
        ],
    ),
    "a new environment": (
        ("--package", GIT),
        (),
        [
            "python3.12 -m venv DIR/venv",
            f"{WORKER_PIP} '{GIT}'",
            "env PYTHONUNBUFFERED=1 DIR/venv/bin/zip-rc train mine.yaml --stage final",
        ],
    ),
    "everything is there": (
        ("--package", GIT, "--run-dir", "gs://bucket/a/run", "--platform", "cpu"),
        ("python", "gcsfuse", "mountpoint"),
        [
            f"{WORKER_PIP} '{GIT}'",
            f"{WORKER_PIP} --force-reinstall --no-deps '{GIT}'",
            "mkdir -p DIR/gcs/bucket/a/run",
            "env PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu DIR/venv/bin/zip-rc train mine.yaml --stage "
            "final run_dir=DIR/gcs/bucket/a/run",
        ],
    ),
    "no install": (
        ("--no-install", "--run-dir", "here"),
        ("python",),
        ["env PYTHONUNBUFFERED=1 DIR/venv/bin/zip-rc train mine.yaml --stage final run_dir=here"],
    ),
}


@pytest.mark.parametrize("case", WORKER_DRY_RUNS)
def test_a_dry_run_on_a_worker_prints_the_exact_commands_and_runs_none(case, machine, tmp_path):
    arguments, there, expected = WORKER_DRY_RUNS[case]
    directory = tmp_path / "worker"
    (machine.checkout / "it's code.tar.gz").touch()
    for name in ("curl", "sudo", "lsb_release", *there):
        write_script(machine.bin / name, FORBIDDEN)
    write_script(machine.bin / "python3.12", "#!/usr/bin/env bash\n[[ $1 == -c ]]\n")
    if "mountpoint" in there:  # it says that the bucket is mounted
        write_script(machine.bin / "mountpoint", "#!/usr/bin/env bash\n")
    if "python" in there:
        for name in ("python", "zip-rc"):
            write_script(directory / "venv" / "bin" / name, FORBIDDEN)
    before = sorted(tmp_path.rglob("*"))
    found = machine.run(
        "tpu_worker.sh",
        "mine.yaml",
        "--stage",
        "final",
        "--dir",
        directory,
        *arguments,
        "--dry-run",
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.replace(str(directory), "DIR").splitlines() == expected
    assert sorted(tmp_path.rglob("*")) == before
    assert not (machine.fake / "forbidden_calls").exists()


@pytest.mark.parametrize("case", ["made", "there", "package", "another package", "no install"])
def test_a_dry_run_on_a_gpu_prints_the_exact_commands_and_runs_none(case, machine):
    write_script(machine.bin / "nvidia-smi", FORBIDDEN)
    write_script(machine.bin / "python3.12", "#!/usr/bin/env bash\n")
    (machine.fake / "in put.jsonl").write_text("{}\n")
    model, output = machine.fake / "model", machine.fake / "out"
    model.mkdir()
    venv = f"{machine.env['HOME']}/.cache/zip_rc_jax/venv-cuda"
    settings = (
        "env -u XLA_PYTHON_CLIENT_MEM_FRACTION XLA_CLIENT_MEM_FRACTION={} "
        "JAX_PLATFORMS=cuda,cpu JAX_COMPILATION_CACHE_DIR={}"
    )
    settings = (
        settings.format("0.9", f"{machine.env['HOME']}/.cache/zip_rc_jax/xla")
        + " JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3"
    )
    extra: list[str] = []
    env: dict[str, str] = {}
    pip = f"{venv}/bin/python -m pip install --quiet --disable-pip-version-check"
    install = [f"python3.12 -m venv {venv}", f"{pip} --editable '{machine.checkout}[cuda]'"]
    if case == "there":
        write_script(pathlib.Path(venv, "bin", "python"), FORBIDDEN)
        install = install[1:]
        env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5", "JAX_COMPILATION_CACHE_DIR": "/c"}
        settings = settings.replace("=0.9", "=.5").replace(
            f"{machine.env['HOME']}/.cache/zip_rc_jax/xla", "/c"
        )
    elif "package" in case:
        extra = [
            "--package",
            "zip-rc-jax[cuda] @ git+https://h/o/zip_rc_jax@1a2b",
            "--mem-fraction=1",
        ]
        install[1] = f"{pip} 'zip-rc-jax[cuda] @ git+https://h/o/zip_rc_jax@1a2b'"
        settings = settings.replace("=0.9", "=1")
        if case == "another package":
            write_script(pathlib.Path(venv, "bin", "python"), FORBIDDEN)
            install = [
                install[1],
                install[1].replace("check '", "check --force-reinstall --no-deps '"),
            ]
    elif case == "no install":
        venv = f"{machine.fake}/venv"
        write_script(pathlib.Path(venv, "bin", "zip-rc"), FORBIDDEN)
        extra, install = ["--venv", venv, "--no-install"], []
    arguments = (
        model,
        "--input",
        machine.fake / "in put.jsonl",
        "--output",
        output,
        "n=8",
        *extra,
        "--dry-run",
        "alpha=0.1",
    )
    found = machine.run("gpu_decode.sh", *arguments, "--", "--chat", "--seed=3", **env)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        *install,
        "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader",
        f"{settings} {venv}/bin/python -c 'import jax; print(jax.devices())'",
        f"{settings} {venv}/bin/zip-rc decode {model} --input '{machine.fake}/in put.jsonl' "
        f"--output {output}"
        " n=8 alpha=0.1 --chat --seed=3",
    ]
    assert not (machine.fake / "forbidden_calls").exists()


def test_another_commit_replaces_the_one_that_an_environment_holds(machine, tmp_path, gpu):
    """pip leaves alone what has the same version, and every commit has."""
    write_script(machine.fake / "venv" / "bin" / "python", PIP)
    write_script(machine.fake / "venv" / "bin" / "zip-rc", "#!/usr/bin/env bash\n")
    spec = "zip-rc-jax[tpu,cuda] @ git+https://h/o/zip_rc_jax@1a2b"
    worker = (
        "mine.yaml",
        "--stage",
        "final",
        "--dir",
        tmp_path / "worker",
        "--venv",
        machine.fake / "venv",
        "--package",
        spec,
    )
    for script, arguments in (
        ("tpu_worker.sh", worker),
        ("gpu_decode.sh", (*gpu, "--package", "zip-rc-jax[cuda] @ git+https://h/o/x")),
    ):
        (machine.fake / "installs").unlink(missing_ok=True)
        assert machine.run(script, *arguments).returncode == 0
        normal, again = (
            install for install in records(machine.fake / "installs") if "pip" in install
        )
        assert normal[-1] == again[-1] == arguments[arguments.index("--package") + 1]
        assert again == [*normal[:-1], "--force-reinstall", "--no-deps", normal[-1]]


# Refusals.


def check_refusal(found, *parts):
    assert found.returncode == 2, found
    error = found.stderr.splitlines()[-1]
    assert "Fix: " in error
    for part in parts:
        assert part in error


GOOD = {
    "--stage": "final",
    "--name": "zip",
    "--zone": "us-east5-b",
    "--type": "v6e-8",
    "--run-dir": "gs://bucket/run",
}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"CONFIG": "missing.yaml"}, ("config 'missing.yaml'", "no such file")),
        ({"CONFIG": None}, ("CONFIG", "not given")),
        ({"--stage": "finale"}, ("--stage='finale'", "policy|critic|final|lite")),
        ({"--stage": None}, ("--stage", "not set")),
        ({"--name": "Zip_1"}, ("TPU_NAME='Zip_1'", "small letters")),
        ({"--name": None}, ("TPU_NAME", "not set", "--name")),
        ({"--zone": "us-east5"}, ("TPU_ZONE='us-east5'", "no zone")),
        ({"--zone": None}, ("TPU_ZONE", "not set")),
        ({"--type": "h100-8"}, ("ACCELERATOR_TYPE='h100-8'", "v5litepod-N")),
        ({"--type": "v6e"}, ("ACCELERATOR_TYPE='v6e'", "v6e-N")),
        ({"--type": "v5e-16"}, ("v5e-16", "--type v5litepod-16")),
        ({"--type": "tpu7x-8"}, ("tpu7x-8", "GKE")),
        ({"--type": None}, ("ACCELERATOR_TYPE", "not set")),
        ({"--project": "Mine"}, ("GCP_PROJECT='Mine'", "no project id")),
        ({"--runtime-version": "a b"}, ("RUNTIME_VERSION='a b'", "v2-alpha-tpuv6e")),
        ({"--run-dir": None}, ("RUN_DIR", "not set", "--no-resume")),
        ({"--run-dir": "runs/x"}, ("RUN_DIR='runs/x'", "gs://BUCKET/PATH")),
        ({"--run-dir": "gs://bucket"}, ("RUN_DIR='gs://bucket'", "no directory in a bucket")),
        ({"--run-dir": "gs://Bucket/x"}, ("RUN_DIR='gs://Bucket/x'", "small letters")),
        ({"--run-dir": "/mnt/x"}, ("RUN_DIR='/mnt/x'", "preemption", "--no-resume")),
        (
            {"--run-dir": None, "": ["--no-resume", "--delete-when-done"]},
            ("--delete-when-done", "deleted with it"),
        ),
        ({"": ["run_dir=gs://bucket/x"]}, ("run_dir=gs://bucket/x", "--run-dir")),
        ({"": ["steps"]}, ("argument 'steps'", "section.key=value")),
        ({"": ["--spott"]}, ("option '--spott'", "--help")),
        ({"": ["--zone"]}, ("--zone", "needs a value")),
        ({"": ["a.b=x\ny"]}, ("control character",)),
        ({"--wait": "1h"}, ("WAIT_SECONDS='1h'", "seconds")),
        ({"--poll": "0"}, ("POLL_SECONDS='0'", "seconds")),
        ({"--max-restarts": "-1"}, ("MAX_RESTARTS='-1'", "count")),
        ({"--package": "zip-rc-jax"}, ("PACKAGE='zip-rc-jax'", "[tpu]")),
        ({"env": {"TPU_SPOT": "yes"}}, ("TPU_SPOT='yes'", "0|1")),
        ({"env": {"TPU_QUEUE": "no"}}, ("TPU_QUEUE='no'", "0|1")),
        ({"env": {"RESUME": "2"}}, ("RESUME='2'", "0|1")),
        ({"env": {"DELETE_WHEN_DONE": "x"}}, ("DELETE_WHEN_DONE='x'", "0|1")),
    ],
)
def test_bad_input_for_a_tpu_is_refused_before_anything_runs(changed, parts, machine):
    write_script(machine.bin / "gcloud", FORBIDDEN)
    given = GOOD | {k: v for k, v in changed.items() if k.startswith("--")}
    config = [changed.get("CONFIG", "mine.yaml")] if changed.get("CONFIG", "mine.yaml") else []
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    check_refusal(
        machine.run(
            "tpu_train.sh", *config, *options, *changed.get("", []), **changed.get("env", {})
        ),
        *parts,
    )
    assert not (machine.fake / "forbidden_calls").exists()


def test_without_gcloud_or_a_checkout_only_what_works_is_offered(machine, tmp_path):
    arguments = ("mine.yaml", "--stage", "final", *WHERE, *BUCKET)
    check_refusal(machine.run("tpu_train.sh", *arguments), "gcloud", "not installed", "--dry-run")
    shutil.copytree(ROOT / "launch", tmp_path / "copy" / "launch")
    machine.checkout, config = tmp_path / "copy", machine.checkout / "mine.yaml"
    check_refusal(
        machine.run("tpu_train.sh", config, *arguments[1:], "--dry-run"),
        "no git checkout",
        "--package",
    )
    assert (
        machine.run(
            "tpu_train.sh", config, *arguments[1:], "--dry-run", "--package", "zip-rc-jax[tpu]"
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("MODEL", "not given")),
        (
            ("no/such/path", "--input", "IN", "--output", "out"),
            ("model 'no/such/path'", "no such file"),
        ),
        (
            ("models/x.gguf", "--input", "IN", "--output", "out"),
            ("model 'models/x.gguf'", "no such file"),
        ),
        (("embedded:x", "--output", "out"), ("INPUT", "not set")),
        (
            ("embedded:x", "--input", "missing", "--output", "out"),
            ("INPUT='missing'", "no such file"),
        ),
        (("embedded:x", "--input", "IN"), ("OUTPUT", "not set")),
        (("embedded:x", "--input", "IN", "--output", "IN"), ("it is a file",)),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--mem-fraction", "1.5"),
            ("XLA_CLIENT_MEM_FRACTION='1.5'", "above 0"),
        ),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--mem-fraction", "0"),
            ("XLA_CLIENT_MEM_FRACTION='0'", "above 0"),
        ),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--package", "zip-rc-jax"),
            ("PACKAGE='zip-rc-jax'", "[cuda]"),
        ),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--no-install", "--venv", "v"),
            ("VENV='v'", "bin/zip-rc"),
        ),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--python", "python2"),
            ("PYTHON='python2'", "3.11"),
        ),
        (("embedded:x", "--input", "IN", "--output", "out"), ("Python", "none was found")),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "n"),
            ("argument 'n'", "section.key=value"),
        ),
        (
            ("embedded:x", "--input", "IN", "--output", "out", "--chat"),
            ("option '--chat'", "--help"),
        ),
    ],
)
def test_bad_input_for_a_gpu_is_refused_before_anything_runs(arguments, parts, machine):
    (machine.fake / "in.jsonl").write_text("{}\n")
    arguments = [str(machine.fake / "in.jsonl") if a == "IN" else a for a in arguments]
    check_refusal(machine.run("gpu_decode.sh", *arguments), *parts)
    assert not (machine.checkout / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("missing.yaml", "--stage", "final", "--no-install"), ("missing.yaml", "no such file")),
        (("mine.yaml", "--no-install"), ("--stage", "not set")),
        (
            ("mine.yaml", "--stage", "last", "--no-install"),
            ("--stage='last'", "policy|critic|final|lite"),
        ),
        (("mine.yaml", "--stage", "final"), ("0 of them", "exactly one")),
        (
            ("mine.yaml", "--stage", "final", "--no-install", "--package", "x"),
            ("2 of them", "exactly one"),
        ),
        (("mine.yaml", "--stage", "final", "--archive", "x.tar.gz"), ("x.tar.gz", "no such file")),
        (
            ("mine.yaml", "--stage", "final", "--no-install", "--venv", "v"),
            ("--venv 'v'", "bin/zip-rc"),
        ),
        (
            ("mine.yaml", "--stage", "final", "--package", "x", "--platform", "gpu"),
            ("--platform='gpu'", "tpu|cuda|cpu"),
        ),
        (
            ("mine.yaml", "--stage", "final", "--package", "x", "--run-dir", "gs://x"),
            ("gs://x", "bucket"),
        ),
        (
            ("mine.yaml", "--stage", "final", "--package", "x", "steps"),
            ("argument 'steps'", "section.key=value"),
        ),
        (("mine.yaml", "--stage"), ("--stage", "needs a value")),
    ],
)
def test_bad_input_for_a_worker_is_refused_before_anything_runs(arguments, parts, machine):
    check_refusal(
        machine.run("tpu_worker.sh", "--dir", machine.fake / "worker", *arguments), *parts
    )
    assert not (machine.fake / "worker").exists()


# A GPU that is there.


@pytest.fixture
def gpu(machine):
    """A virtual environment whose programs say how they were called, a driver, and the arguments to
    use them."""
    write_script(machine.bin / "nvidia-smi", '#!/usr/bin/env bash\n. "$FAKE/driver"\n')
    (machine.fake / "driver").write_text("echo 'NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB'\n")
    for name in ("python", "zip-rc"):
        text = (
            f'#!/usr/bin/env bash\necho "{name} $* $JAX_PLATFORMS $XLA_CLIENT_MEM_FRACTION '
            f'${{XLA_PYTHON_CLIENT_MEM_FRACTION:-}}"\n'
        )
        write_script(
            machine.fake / "venv" / "bin" / name,
            text + '[[ ! -e $FAKE/$(basename "$0").fails ]] || exit 5\n',
        )
    (machine.fake / "in.jsonl").write_text("{}\n")
    return (
        "embedded:x",
        "--input",
        machine.fake / "in.jsonl",
        "--output",
        machine.fake / "out",
        "--venv",
        machine.fake / "venv",
    )


def test_decoding_runs_with_the_memory_and_the_platform_and_reports_its_status(machine, gpu):
    found = machine.run("gpu_decode.sh", *gpu, "n=4", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert found.returncode == 0, found.stderr
    pip, check, decode = found.stdout.splitlines()
    assert pip.startswith(
        "python -m pip install --quiet --disable-pip-version-check --editable "
        f"{machine.checkout}[cuda]"
    )
    assert check == "python -c import jax; print(jax.devices()) cuda,cpu 0.5 "
    assert (
        decode
        == f"zip-rc decode embedded:x --input {machine.fake}/in.jsonl --output {machine.fake}/out "
        "n=4 cuda,cpu 0.5 "
    )
    assert "NVIDIA H100 80GB HBM3, 580.65.06" in found.stderr
    (machine.fake / "zip-rc.fails").touch()
    assert machine.run("gpu_decode.sh", *gpu, "--no-install").returncode == 5
    (machine.fake / "python.fails").touch()
    check_refusal(
        machine.run("gpu_decode.sh", *gpu, "--no-install"), "JAX", "does not find the GPU"
    )


def test_no_gpu_and_an_old_driver_are_said(machine, gpu):
    (machine.fake / "driver").write_text("echo 'A100, 535.104.05, 40960 MiB'\n")
    check_refusal(machine.run("gpu_decode.sh", *gpu), "NVIDIA driver 535", "580", "--any-driver")
    assert machine.run("gpu_decode.sh", *gpu, "--any-driver").returncode == 0
    (machine.fake / "driver").write_text("echo 'No devices were found'; exit 6\n")
    check_refusal(machine.run("gpu_decode.sh", *gpu), "finds no GPU (No devices were found)")
    (machine.bin / "nvidia-smi").unlink()
    check_refusal(machine.run("gpu_decode.sh", *gpu), "nvidia-smi", "not installed")


# A TPU that is there, and is taken away.

PREEMPTED = (
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE until seen",
    "SUSPENDING SERVICE",
    "SUSPENDED SERVICE",
)
TRAIN_TWICE = r"""
if [[ $(cat "$FAKE/life") == 1 ]]; then
  echo "step 7 on worker $worker"
  echo 7 >"$run/checkpoint"
  touch "$FAKE/began$worker"
  for other in $WORKERS; do while [[ ! -e $FAKE/began$other ]]; do sleep 0.02; done; done
  while ! grep -q 'step 7 on worker 0' "$FAKE/shown"; do sleep 0.02; done
  touch "$FAKE/seen"
  sleep 60
fi
echo "worker $worker went on from step $(cat "$run/checkpoint")"
"""


def test_a_preempted_training_is_started_again_and_goes_on(machine):
    """Queued, active, suspended, deleted, created again, done: two workers, real files, both
    shells."""
    machine.cloud(PREEMPTED, ("ACTIVE",), training=TRAIN_TWICE, workers=2)
    arguments = (
        "mine.yaml",
        "--stage",
        "final",
        *WHERE,
        *BUCKET,
        *FAST,
        "--spot",
        "--delete-when-done",
    )
    found = machine.run("tpu_train.sh", *arguments, *ODD)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert "step 7 on worker 0" in lines
    assert "worker 0 went on from step 7" in lines
    # only worker 0's log is shown
    assert not any("on worker 1" in line or "worker 1 went" in line for line in lines)
    states = [line.split(": ")[-1] for line in found.stderr.splitlines() if "TPU zip: " in line]
    once = ["MISSING", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert states == [*once, "SUSPENDING", "SUSPENDED", "MISSING", "READY"]
    queued = "queued-resources"
    assert machine.verbs() == [
        f"{queued} create",
        *DEPLOY,
        f"{queued} delete",
        f"{queued} create",
        *DEPLOY,
        f"{queued} delete",
    ]
    creates = [call for call in machine.calls if call[3] == "create"]
    assert creates[0] == creates[1]
    assert "--spot" in creates[0]
    trainings = records(machine.fake / "trainings")
    assert len(trainings) == 4
    for command in trainings:
        run_dir = command[4]
        assert command == ["train", "mine.yaml", "--stage", "final", run_dir, *ODD, "tpu,cpu"]
        assert run_dir.endswith("/zip_rc_launch/gcs/bucket/a/run")
    for mount in records(machine.fake / "mounts"):
        assert mount[:-1] == [
            "--implicit-dirs",
            "--rename-dir-limit=1000000",
            "--metadata-cache-ttl-secs=0",
            "bucket",
        ]
    assert (machine.fake / "commits").read_text().split() == [commit_of(machine.checkout)] * 4
    installs = records(machine.fake / "installs")
    assert len(installs) == 4
    assert all(
        i[:-1] == ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for i in installs
    )
    assert all(i[-1].endswith("/zip_rc_launch/src[tpu]") for i in installs)
    assert (machine.fake / "life").read_text() == "2\n"


def test_without_resume_a_preemption_ends_it(machine):
    machine.cloud(PREEMPTED, training=TRAIN_TWICE)
    found = machine.run(
        "tpu_train.sh",
        "mine.yaml",
        "--stage",
        "final",
        *WHERE,
        *BUCKET,
        *FAST,
        "--no-resume",
        "--package=x[tpu]",
    )
    assert found.returncode == 1
    assert "the training was preempted" in found.stderr
    assert "TPU zip is SUSPENDED. Delete what is left of it with: gcloud" in found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY]
    assert records(machine.fake / "installs")[0][-1] == "x[tpu]"


def test_a_request_that_fails_after_a_preemption_is_made_again(machine):
    machine.cloud(PREEMPTED, ("WAITING_FOR_RESOURCES", "FAILED"), ("ACTIVE",), training=TRAIN_TWICE)
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 0, found.stderr
    create, delete = "queued-resources create", "queued-resources delete"
    assert machine.verbs() == [create, *DEPLOY, delete, create, delete, create, *DEPLOY]


def test_requests_that_go_on_failing_after_a_preemption_end_with_the_wait(machine):
    machine.cloud(PREEMPTED, *[("FAILED",)] * 400, training=TRAIN_TWICE)
    found = machine.run(
        "tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST, "--wait", "3"
    )
    assert found.returncode == 1
    assert "not ready within 3 seconds" in found.stderr
    assert machine.verbs().count("queued-resources delete") > 2, (
        "the preempted one, and several that failed"
    )


def test_without_a_queue_a_preempted_tpu_is_created_until_there_is_capacity(machine):
    training = TRAIN_TWICE.replace('touch "$FAKE/seen"', 'touch "$FAKE/full" "$FAKE/seen"')
    machine.cloud(
        ("CREATING", "READY until seen", "PREEMPTED"), ("READY",), training=training, queue=False
    )
    found = machine.run(
        "tpu_train.sh", "mine.yaml", "--stage", "lite", *WHERE, *BUCKET, *FAST, "--no-queue"
    )
    assert found.returncode == 0, found.stderr
    create, delete = "tpu-vm create", "tpu-vm delete"
    assert machine.verbs() == [create, *DEPLOY, delete, create, create, *DEPLOY]
    assert "no more capacity" in found.stderr
    assert "still runs and costs money" in found.stderr


@pytest.mark.parametrize(("status", "workers"), [(130, 1), (134, 2)])
def test_a_training_that_was_interrupted_on_a_healthy_tpu_is_started_again_there(
    machine, status, workers
):
    training = (
        f'if [[ ! -e $FAKE/once$worker ]]; then touch "$FAKE/once$worker"; exit {status}; '
        "fi; echo fine\n"
    )
    machine.cloud(("ACTIVE",), training=training, workers=workers)
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 0, found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY, *DEPLOY]
    assert "fine" in found.stdout


def test_a_single_worker_that_crashes_is_not_started_again(machine):
    """JAX ends a process with 134 when it has lost another one; here there is no other one, and a
    crash would come again."""
    machine.cloud(("ACTIVE",), training="exit 134\n")
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 134
    assert "failed with status 134" in found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY]


def test_restarts_are_bounded(machine):
    machine.cloud(("ACTIVE",), training="exit 130\n")
    found = machine.run(
        "tpu_train.sh",
        "mine.yaml",
        "--stage",
        "final",
        *WHERE,
        *BUCKET,
        *FAST,
        "--max-restarts",
        "1",
    )
    assert found.returncode == 1
    assert "interrupted again, after 1 restarts" in found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY, *DEPLOY]


@pytest.mark.parametrize("give_up", [("--no-resume",), ("--max-restarts", "0")])
def test_a_training_that_is_not_restarted_leaves_no_tpu_running_unnoticed(give_up, machine):
    arguments = ("mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST, *give_up)
    machine.cloud(("ACTIVE",), ("ACTIVE",), training="exit 130\n")
    found = machine.run("tpu_train.sh", *arguments)
    assert found.returncode == 1
    assert "the training was interrupted" in found.stderr
    assert "still runs and costs money" in found.stderr
    found = machine.run("tpu_train.sh", *arguments, "--delete-when-done")
    assert found.returncode == 1
    assert "still runs" not in found.stderr
    assert machine.verbs() == [
        "queued-resources create",
        *DEPLOY,
        *DEPLOY,
        "queued-resources delete",
    ]


def test_what_a_preemption_leaves_is_deleted_too_where_nothing_is_restarted(machine):
    machine.cloud(PREEMPTED, training=TRAIN_TWICE)
    arguments = (
        "mine.yaml",
        "--stage",
        "final",
        *WHERE,
        *BUCKET,
        *FAST,
        "--no-resume",
        "--delete-when-done",
    )
    assert machine.run("tpu_train.sh", *arguments).returncode == 1
    assert machine.verbs() == ["queued-resources create", *DEPLOY, "queued-resources delete"]


def test_a_worker_that_fails_ends_it_with_its_status_although_another_still_waits(machine):
    machine.cloud(
        ("ACTIVE",),
        training='[[ $worker == 1 ]] && exit 3; echo "waiting for worker 1"; sleep 60\n',
        workers=2,
    )
    found = machine.run(
        "tpu_train.sh",
        "mine.yaml",
        "--stage",
        "final",
        *WHERE,
        *BUCKET,
        *FAST,
        "--delete-when-done",
    )
    assert found.returncode == 3
    assert "failed with status 3" in found.stderr
    assert machine.verbs()[-1] == "queued-resources delete"


def test_called_again_it_follows_the_training_that_runs(machine):
    machine.cloud(
        ("ACTIVE",),
        training="echo working; while [[ ! -e $FAKE/enough ]]; do sleep 0.02; done; echo "
        "finished\n",
    )
    arguments = ("mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    first = machine.start("tpu_train.sh", *arguments)
    wait_for(
        lambda: (
            "working" in first.shown() and sum("tail -c" in call[-1] for call in machine.calls) > 4
        )
    )
    assert first.shown().splitlines().count("working") == 1
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=20) == 130
    assert "what runs there goes on" in first.shown()
    other = machine.run("tpu_train.sh", *arguments, "final.steps=3")
    assert other.returncode == 2
    assert "another training runs there" in other.stderr
    again = machine.start("tpu_train.sh", *arguments)
    wait_for(lambda: "this already runs" in again.shown() and "working" in again.shown())
    (machine.fake / "enough").touch()
    assert again.wait(timeout=20) == 0
    assert "\nfinished\n" in again.shown()
    assert len(records(machine.fake / "trainings")) == 1
    assert machine.verbs().count("queued-resources create") == 1


@pytest.mark.parametrize(
    ("life", "setting", "status", "parts"),
    [
        (
            ("WAITING_FOR_RESOURCES", "FAILED"),
            {},
            1,
            ("the request for TPU zip failed", "queued-resources delete zip"),
        ),
        (
            ("WAITING_FOR_RESOURCES",),
            {"--wait": "1"},
            1,
            ("not ready within 1 seconds", "WAITING_FOR_RESOURCES", "--wait"),
        ),
        (
            ("ACTIVE",),
            {"--type": "v6e-4"},
            2,
            ("it is there already, as v6e-8 and not v6e-4", "--name"),
        ),
        (("ACTIVE",), {"file": "unreachable"}, 1, ("workers could not be reached",)),
        (("ACTIVE",), {"file": "forbidden"}, 1, ("PERMISSION_DENIED", "could not say")),
        (("ACTIVE",), {"file": "full"}, 1, ("no more capacity", "could not be created")),
    ],
)
def test_what_cannot_go_on_ends_with_a_reason(life, setting, status, parts, machine):
    machine.cloud(life, training="sleep 60\n")
    options = [word for name, value in setting.items() if name != "file" for word in (name, value)]
    if "file" in setting:
        (machine.fake / setting["file"]).touch()
    found = machine.run(
        "tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST, *options
    )
    assert found.returncode == status, found.stderr
    for part in parts:
        assert part in found.stderr
    assert "tpu-vm ssh start" not in machine.verbs()


def test_a_tpu_that_someone_deletes_is_not_created_again(machine):
    machine.cloud(("ACTIVE",), training='rm "$FAKE/states"; sleep 60\n')
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 1
    assert "deleted or stopped by someone else" in found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY]


@pytest.mark.parametrize("training", ["sleep 60\n", "exit 130\n"])
def test_a_tpu_that_its_user_suspends_is_not_created_again(training, machine):
    """Whether the state is seen first, or that the training was interrupted."""
    machine.cloud(
        ("ACTIVE until gone", "SUSPENDING USER", "SUSPENDED USER"),
        ("ACTIVE",),
        training='touch "$FAKE/gone"; ' + training,
    )
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 1
    assert "deleted or stopped by someone else (SUSPENDED)" in found.stderr
    assert machine.verbs() == ["queued-resources create", *DEPLOY]


def test_a_tpu_that_its_user_suspends_during_the_installation_is_not_created_again(machine):
    machine.cloud(("ACTIVE", "SUSPENDED USER"), ("ACTIVE",), training="sleep 60\n")
    (machine.fake / "unreachable").touch()
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 1
    assert "deleted or stopped by someone else (SUSPENDED)" in found.stderr
    assert machine.verbs() == ["queued-resources create", "tpu-vm ssh mkdir"]


def test_a_suspension_that_names_no_initiator_counts_as_a_preemption(machine):
    machine.cloud((*PREEMPTED[:3], "SUSPENDED"), ("ACTIVE",), training=TRAIN_TWICE)
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 0, found.stderr
    assert machine.verbs().count("queued-resources create") == 2


@pytest.mark.parametrize("left", ["FAILED", "SUSPENDED USER"])
def test_what_an_earlier_request_left_behind_is_deleted_first(left, machine):
    machine.cloud(("ACTIVE",), training="echo fine\n")
    (machine.fake / "states").write_text(left + "\n")
    found = machine.run("tpu_train.sh", "mine.yaml", "--stage", "final", *WHERE, *BUCKET, *FAST)
    assert found.returncode == 0, found.stderr
    assert machine.verbs() == ["queued-resources delete", "queued-resources create", *DEPLOY]


# The worker, with a fake zip-rc where its own ways are the matter, and with the real one.


def worker_status(machine, directory):
    return machine.run("tpu_worker.sh", "--status", "--dir", directory).stdout


def test_a_worker_in_the_background_says_how_it_is(machine):
    directory = machine.fake / "worker"
    write_script(
        machine.fake / "venv" / "bin" / "zip-rc",
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 130' TERM\necho up\nsleep 60 & wait\n",
    )
    arguments = (
        "mine.yaml",
        "--stage",
        "final",
        "--dir",
        directory,
        "--venv",
        machine.fake / "venv",
        "--no-install",
    )
    assert worker_status(machine, directory) == "zip_rc_status: none\n"
    assert machine.run("tpu_worker.sh", *arguments, "--detach").returncode == 0
    assert worker_status(machine, directory) == "zip_rc_status: running\n"
    assert "already runs" in machine.run("tpu_worker.sh", *arguments, "--detach").stderr
    check_refusal(machine.run("tpu_worker.sh", *arguments), "another training runs there")
    wait_for(lambda: "up" in (directory / "log").read_text())
    # as a machine does that is taken away
    os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
    wait_for((directory / "status").exists)
    assert worker_status(machine, directory) == "zip_rc_status: 130\n"
    assert "saved" in (directory / "log").read_text()
    machine.run("tpu_worker.sh", *arguments, "--detach")
    wait_for(lambda: "up" in (directory / "log").read_text())
    os.killpg(int((directory / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: worker_status(machine, directory) == "zip_rc_status: lost\n")
    assert (directory / "log.old").exists()


def test_a_failing_installation_is_reported(machine):
    write_script(
        machine.fake / "venv" / "bin" / "python",
        "#!/usr/bin/env bash\necho 'no such package'\nexit 4\n",
    )
    directory = machine.fake / "worker"
    arguments = (
        "mine.yaml",
        "--stage",
        "final",
        "--dir",
        directory,
        "--venv",
        machine.fake / "venv",
        "--package",
        "x[tpu]",
    )
    assert machine.run("tpu_worker.sh", *arguments).returncode == 4
    assert worker_status(machine, directory) == "zip_rc_status: 4\n"


@pytest.mark.parametrize(
    ("platform", "variable"),
    [("tpu", "tpu,cpu"), ("cuda", "cuda,cpu"), ("cpu", "cpu"), (None, "mine")],
)
def test_jax_must_find_the_platform_that_is_named(platform, variable, machine):
    write_script(
        machine.fake / "venv" / "bin" / "zip-rc",
        '#!/usr/bin/env bash\necho "platforms $JAX_PLATFORMS"\n',
    )
    arguments = [
        "mine.yaml",
        "--stage",
        "final",
        "--dir",
        machine.fake / "worker",
        "--venv",
        machine.fake / "venv",
        "--no-install",
    ]
    found = machine.run(
        "tpu_worker.sh",
        *arguments,
        *(("--platform", platform) if platform else ()),
        JAX_PLATFORMS="mine",
    )
    assert f"platforms {variable}\n" in found.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run directory with a random policy of the demo's vocabulary and graded rollouts, and a
    config that trains on them."""
    directory = tmp_path_factory.mktemp("run")
    path = directory / "tiny.yaml"
    text = (
        (ROOT / "configs" / "chain_sum_demo.yaml")
        .read_text()
        .replace("path: embedded:chain_sum_policy", "path: ''")
    )
    path.write_text(text)
    config = load_config(
        path, ["policy.examples=16", "policy.train.row_tokens=160", "model.n_layers=1"]
    )
    tokenizer = word_level(vocabulary(LARGEST_NUMBER))
    write_rollouts(
        directory / "graded", solution_rollouts(config, tokenizer), metadata={"made": "by a test"}
    )
    LanguageModel.create(config.model, tokenizer, 0).save(directory / "policy")
    return directory


@pytest.mark.slow
def test_the_worker_really_trains_resumes_and_loads(prepared, machine):
    venv = pathlib.Path(sys.executable).parent.parent
    settings = (
        "critic.steps=2",
        "critic.batch_rows=2",
        "critic.eval_rollouts=0",
        "critic.log_every=1",
        "critic.save_seconds=0.001",
    )
    arguments = (
        prepared / "tiny.yaml",
        "--stage",
        "critic",
        "--dir",
        machine.fake / "worker",
        "--venv",
        venv,
        "--no-install",
    )
    arguments += ("--run-dir", prepared, "--platform", "cpu", *settings)

    def train():
        found = machine.run(
            "tpu_worker.sh", *arguments, timeout=120, XLA_FLAGS="--xla_backend_optimization_level=0"
        )
        assert (
            worker_status(machine, machine.fake / "worker")
            == f"zip_rc_status: {found.returncode}\n"
        )
        return found.returncode

    def metrics():
        return [
            json.loads(line)
            for line in (prepared / "critic" / "metrics.jsonl").read_text().splitlines()
        ]

    failing = machine.start(
        "tpu_worker.sh", *arguments, "--dir", machine.fake / "other", "critic.steps=0"
    )
    assert train() == 0
    first = metrics()
    assert [m["step"] for m in first] == [1, 2]
    # As if it had been killed after its first checkpoint: the second step is done again, the first
    # is not.
    shutil.rmtree(prepared / "critic" / "model")
    shutil.rmtree(prepared / "critic" / "checkpoints" / "2")
    assert train() == 0
    second = metrics()
    assert second[0] == first[0]
    assert second[1]["train/joint"] == first[1]["train/joint"]
    assert second[1]["train/tokens_per_second"] != first[1]["train/tokens_per_second"]
    assert train() == 0  # loads the finished model
    assert metrics() == second
    assert failing.wait(timeout=60) == 2
    assert re.search(r"steps=0 .*: it counts at least one", failing.shown())
    assert worker_status(machine, machine.fake / "other") == "zip_rc_status: 2\n"
