"""Mamba-Sea: augmentation of feature sequences and of brightness, and VM-UNet (arXiv 2504.17515)."""
