"""GIN: random convolutions of the input for unseen contrasts (arXiv 2111.12525); the transform is in parts/."""
