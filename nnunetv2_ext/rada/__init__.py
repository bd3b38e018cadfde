"""RADA: three co-trained networks that learn from a few annotated planes per volume (arXiv 2604.11164)."""
