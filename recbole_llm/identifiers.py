"""What every part of the program asks of the ids of users and items."""

# a longer id is refused by the service (422), and so by the import
MAX_ID_CHARACTERS = 256
# GET /v1/items/ID/similar is a route of its own: an item id with this ending cannot be read by GET /v1/items/ID
ITEM_ROUTE_ENDINGS = ("/similar",)
