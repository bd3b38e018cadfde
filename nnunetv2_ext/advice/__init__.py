"""What to run on a dataset, what not, and which control beside it: rules of the house, and of each method's package."""
