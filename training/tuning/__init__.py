"""Settings searched: many variants of a subject train in one fused pack, the worse ones end early, the best is written
down.

May import every room of `training` below it. Publishes nothing, and leaves no photo and none of its latents behind."""
