"""The losses as dense, plain PyTorch: they import nothing of the product that they are compared with."""
