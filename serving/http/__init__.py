"""The HTTP app: wire types, tenants and keys, and one file a surface. No tensor is computed here."""
