"""The demo of the temperature: fixed, learned, and fitted to held-out pairs through a training."""
