"""Who may call, and how slowly: keys and tenants, the guard that runs before bodies are read, timeouts."""
