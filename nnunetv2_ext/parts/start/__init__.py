"""Weights of a model that exists for the start of a training (setting ``init_from``)."""
