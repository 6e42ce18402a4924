"""Files that describe items, whatever their kind: which belongs to which item, reading under limits, encoding through the store."""
