"""Which key blocks each query block attends to, and the order of the tokens in them."""
