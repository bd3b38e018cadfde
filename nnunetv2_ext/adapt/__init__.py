"""A finished nnU-Net adapted to a new site with a few labelled cases: stock model in, stock model out."""
