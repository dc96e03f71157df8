"""Adapters on their way into the bank: registry, local disk, host memory, slots of the device."""
