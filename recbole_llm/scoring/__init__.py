"""From histories and item vectors to scores and probabilities.

``rows`` holds histories, ``score`` the score itself, ``towers`` and ``losses`` the block that gradient descent trains,
``item_rows`` the items of one process or of several, ``probability`` the map from scores to probabilities.
"""
