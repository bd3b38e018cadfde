"""SpatialNoise: labels with errors that hang together, after Tadokoro et al. (arXiv 2504.14795)."""
