"""Repairs of RecBole, each with its upstream line, its condition and the version that ends it."""
