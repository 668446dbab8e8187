"""A training over two processes beside one process: `make demo-distributed`."""
