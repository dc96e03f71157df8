"""Judging: scores of checkpoints, the chosen step, comparisons, protocols and reports.

May import `sampling` and what is below it, and `run` for where records are kept. Never trains and publishes nothing."""
