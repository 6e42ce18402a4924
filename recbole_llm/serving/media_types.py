"""What the body of a request may be that is a picture's file."""

MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif")
