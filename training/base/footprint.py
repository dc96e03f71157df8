"""What a worker holds in memory, from the sizes of its base, and how much it takes on at once. Knows no torch.

What a network holds grows with its width and with the cells (pixels, for the VAE) that pass through it. The bytes are
those of 16 bit, measured with SD 1.x at 256 px in bf16 on a CPU.
"""

PROCESS_BYTES = 1.1e9  # Python, torch, diffusers, transformers, and what the allocator does not give back
# weight, gradient and Adam's two moments of a trained parameter, in fp32
STATE_BYTES = 16
AVERAGE_BYTES = 4  # and its moving average, where it is kept
# per width of the network and cell: a row that trains (of it 0.87 are saved for backward) and one that draws; per width
# of the VAE and pixel
TRAINED_BYTES = 326e6 / (320 * 32**2)
DRAWN_BYTES = 54e6 / (320 * 32**2)
PIXEL_BYTES = 90e6 / (128 * 256**2)
RECOMPUTED = 0.15  # of a row's activations stays where they are recomputed

MOST_PICTURES = 32
PICTURE_CELLS = 2**14  # drawing may not take more memory than training a few rows
VAE_PIXELS = 2**19


def pictures_at_once(cells: int) -> int:
    """How many pictures of `cells` latent cells are drawn in one batch."""
    return max(1, min(MOST_PICTURES, PICTURE_CELLS // cells))


def images_at_once(pixels: int) -> int:
    """How many images of `pixels` pixels the VAE takes in one batch."""
    return max(1, VAE_PIXELS // pixels)


def training_bytes(rows: int, cells: int, cell_bytes: float, *, recompute: bool) -> float:
    """Bytes that rows which train hold at most."""
    return rows * cells * cell_bytes * (RECOMPUTED if recompute else 1.0)


def drawing_bytes(pictures: int, cells: int, cell_bytes: float) -> float:
    """Bytes that drawing `pictures` pictures holds at most; each is drawn with and without its prompt."""
    return 2 * min(pictures, pictures_at_once(cells)) * cells * cell_bytes


def vae_bytes(pixels: int, pixel_bytes: float) -> float:
    """Bytes that the VAE holds at most for images of `pixels` pixels."""
    return images_at_once(pixels) * pixels * pixel_bytes
