"""Problems, prompts, rollouts, and the batches that training reads.

Problem -> prompt -> rollout -> graded and labelled rollout -> `TrainBatch`, one file a step:

tasks               problems with exact answers, by level or from a file
prompts             the text or token ids of a problem
rollouts, parquet   samples of a policy on disk: our own format, and the one of the paper's authors
summary, checks     what planning needs of rollouts, and whether a model can train on them
packing, batches    which rollouts share a row, and the arrays that a training step takes
prediction_items    what `zip-rc predict` reads
worked_solutions    the training text of the demo's policies
"""
