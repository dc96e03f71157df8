"""Training on Ray: the cluster, the driver of a run, its lanes, and runs elsewhere as jobs."""
