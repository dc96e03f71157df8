"""The models that look at pictures, each behind a small protocol and with a name that goes where its numbers go."""
