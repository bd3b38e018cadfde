"""A small 2-D network in the manner of Med-2D SegNet (arXiv 2504.14715)."""
