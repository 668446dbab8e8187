"""Between a loss and the primitive: arguments to a problem, and vectors of rows to a loss."""
