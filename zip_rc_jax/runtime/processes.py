"""How the user says that several processes run one command.

Kept apart from `distributed`, which imports JAX.
"""

COORDINATOR, PROCESSES, PROCESS_ID = "ZIP_RC_COORDINATOR", "ZIP_RC_PROCESSES", "ZIP_RC_PROCESS_ID"
HEARTBEAT = "ZIP_RC_HEARTBEAT_SECONDS"
HELP = f"""Several processes: start the same command in each, with the same run_dir on a file system
that all of them see. On a Cloud TPU with several hosts they find each other. Elsewhere set, in each
process,
  {COORDINATOR}=HOST:PORT  where process 0 listens; or `auto` under Slurm and Open MPI
  {PROCESSES}=N            how many there are
  {PROCESS_ID}=I           which one this is, from 0
On CPUs also set JAX_PLATFORMS=cpu.
If one ends, the others end too, after at most {HEARTBEAT} (60).
Started again, all go on from the last checkpoint.
With run_dir=gs://BUCKET/run, `rollout`, `grade` and `label` need none of this: each process that is
started, on any machine and at any time, takes chunks that no other one has."""
