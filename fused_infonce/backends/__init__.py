"""The primitive on a device: one contract, and a folder for each backend."""
