"""The way from a user's arguments to the primitive, and from the statistics of rows back to a loss."""
