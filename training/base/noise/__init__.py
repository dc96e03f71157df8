"""The noise process of a base: DDPM and flow matching, their levels for training and schedules for sampling."""
