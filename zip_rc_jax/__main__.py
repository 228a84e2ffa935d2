"""`zip-rc`, also as `python -m zip_rc_jax`."""

import sys

from zip_rc_jax.host_memory import keep_freed_memory


def main() -> int:
    keep_freed_memory()
    # Only now: imports of the command line start threads, which must not have arenas of their own.
    from zip_rc_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
