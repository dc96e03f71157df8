"""The subject loop around `train`: subjects are prepared, kept (checkpoints, events, samples) and finished.

Each of these returns a result; a subject's failure is one of them and costs no other subject a step."""
