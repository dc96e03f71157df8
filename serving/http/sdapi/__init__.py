"""AUTOMATIC1111's API, for its clients; fields and options that are not supported are refused by name."""
