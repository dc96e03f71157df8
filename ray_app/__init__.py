"""Ray and the terminal: nothing here computes a tensor or decides what could be decided without Ray."""
