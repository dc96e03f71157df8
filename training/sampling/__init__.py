"""Pictures while training and judging: a batched sampler, pictures of many adapters, sweeps of a weight.

May import `adapters`, `base` and errors. Serving has an engine of its own."""
