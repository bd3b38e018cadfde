"""What methods share: teachers, ramps, consistency, masks, pseudo-labels, start weights. Knows no method."""
