"""Class vectors: CLIP's and learned ones, and how they enter the networks."""
