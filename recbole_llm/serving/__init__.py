"""A trained model online: an export that is safe to read, and a service that answers from it.

Nothing here imports RecBole; torch is loaded by the export and by the text encoder alone, never by a request.
"""
