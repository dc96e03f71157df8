"""Pictures in and out: decoded with care, encoded, and previewed while they are made."""
