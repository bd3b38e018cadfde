"""PEMMA: an input channel more for a trained network, which stays as it is (after arXiv 2404.13704)."""
