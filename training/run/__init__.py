"""Runs and the states of their subjects: the subject queue, submission, lead, shares, cancel and log.

May import `photos`, `manifest`, `storage` and what of `base` needs no torch. Plain Python: no torch and no Ray, so one
queue serves a cluster, a local run, the simulator and tests."""
