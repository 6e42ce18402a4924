"""From an item's picture files to vectors. Pillow is imported when the first picture is read (extra ``images``)."""
