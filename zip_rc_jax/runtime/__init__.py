"""The machine: processes, devices, files, signals. It knows nothing of models.

errors, extras                    `UsageError`; which extra installs a missing package
sharding                          the mesh, and where each named axis lies
distributed, processes            several processes: how they start, and what they agree on
storage, temporaries, locks       files that are complete or absent, one process a directory
settings                          whether files were made with the settings of today
signals, progress, malloc         asked to stop, telling how far, freed memory
"""
