"""RLHF: algorithms, each in a file of its own, and the trainer that runs them."""
