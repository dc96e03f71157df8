"""The fused step: packs of subjects, their batches, losses, optimizers, checkpoints and memory.

May import every room of `training` below it. `train` yields and saves nothing; `worker/` is what saves and reports."""
