"""`zip-rc`, also as `python -m zip_rc_jax`."""

import sys

from zip_rc_jax.runtime.malloc import keep_freed_memory


def main() -> int:
    keep_freed_memory(one_arena=sys.argv[1:2] in (["train"], ["demo"]))  # both train
    # Only now: imports of the command line start threads, which take their arenas then.
    from zip_rc_jax.cli import main as cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
