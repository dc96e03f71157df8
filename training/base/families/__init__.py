"""One file a family. `FAMILIES` lists them; nothing else names a pipeline, UNet, CLIP or VAE class."""
