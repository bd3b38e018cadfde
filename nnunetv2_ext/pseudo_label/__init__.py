"""Pseudo-labels by nnU-Net itself: the baseline of everything that learns from unlabelled scans."""
