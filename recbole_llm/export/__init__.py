"""Exports: a trained model as a folder of safe files. Format, reader, writer, and the making of one.

The reader and the arithmetic (``pooling``, ``text_map``) load no torch.
"""
