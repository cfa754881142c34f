"""Weights of Hugging Face checkpoints, in and out: `redco_like.models.load` and `save`.

`names` says what a map of names is, `families` has one for each family; `files`, `scatter`, `shards` and `read` move
the numbers.
"""
