"""The frozen model: where its files lie, what its configs say, and how it encodes, predicts and decodes.

A family (`families/`, one file each) is all that knows a model's classes. May import `storage` and errors. Never
trains, and nothing here knows adapters: a bank lies over a base from outside."""
