"""The stages, one file each, from files to files in one run directory; calling a stage again
resumes it.

policy -> rollouts -> graded -> critic -> labelled -> final (and lite). `zip-rc` has one subcommand
per stage; `demo` runs them all. Grading, labelling and training the head read `config.data`
instead, if it names rollouts from elsewhere.

With several processes, all call the same stage. Training is one program on all their devices.
Sampling, grading and labelling are cut into chunks that the processes share; each works on its own
devices, and the first joins what they made.
"""
