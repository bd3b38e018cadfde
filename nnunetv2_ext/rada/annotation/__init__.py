"""Annotated planes: finding them, making them, and what of them reaches training."""
