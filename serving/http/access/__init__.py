"""Who may ask, and how long they may take to say what: keys and tenants, the guard before bodies, timeouts."""
