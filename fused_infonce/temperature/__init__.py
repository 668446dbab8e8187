"""The temperature of a loss, held and learned."""
