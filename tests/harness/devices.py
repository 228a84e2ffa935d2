"""Eight host devices for every test; the default layout still uses one. Import this before JAX."""

from __future__ import annotations

import os

FLAG = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # they decide what a pipe looks like
    os.environ.pop(name, None)

from zip_rc_jax.runtime.distributed import force_ordered_collectives

# before JAX reads the flags: tests run programs on meshes too
force_ordered_collectives(os.environ)
