"""Serving: one base, a bank of adapters, and requests that join and leave between denoising steps.

Rooms: `http` over `engine`. May import `training.base`, `training.adapters`, `training.storage` and `training.errors`,
and nothing else of training; knows no Ray."""
