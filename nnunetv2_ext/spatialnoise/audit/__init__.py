"""Which labels of a dataset are probably wrong, by models that have not seen them."""
