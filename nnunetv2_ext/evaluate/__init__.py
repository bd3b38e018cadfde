"""Scores of segmentations against the truth: Dice, HD95 and NSD per structure and case, in mm."""
