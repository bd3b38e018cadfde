"""Commands of PEMMA."""
