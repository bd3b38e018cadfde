"""Expected Dice of cases that nobody has labelled, for finished nnU-Net models (after SPE, arXiv 2504.15667)."""
