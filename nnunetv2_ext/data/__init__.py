"""Datasets: finding, reading, deriving, splitting, subjects, loaders, caches. Knows no method."""
