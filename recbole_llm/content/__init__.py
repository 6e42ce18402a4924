"""From an item row to a sentence, a vector and a store; knows neither RecBole nor the kernels."""
