"""The transformer base `pocket-dit`: a tiny Z-Image over the pocket VAE and a Qwen3 of words, trained from nothing."""
