"""From an item's row to a text, a vector and a store. Neither RecBole nor the kernels are imported."""
