"""A trained model as a folder of safe files: the format, a reader that trusts nothing, a writer, and the making of one.

The reader and the arithmetic (``pooling``, ``text_map``) load no torch.
"""
