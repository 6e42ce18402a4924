"""Encoders whose last layers are trained: with gradients, as a small file beside the base's weights, and merged with them."""
