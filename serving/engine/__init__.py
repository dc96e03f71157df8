"""The engine: admission, slots, tiers, forwards and samplers. `loop` joins it to asyncio. No HTTP."""
