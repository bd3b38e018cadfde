"""Annotated planes carried over to the slices beside them."""
