"""From an item's sound files to vectors. soundfile is imported when the first sound is read (extra ``audio``)."""
