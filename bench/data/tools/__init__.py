"""What looks at face data, checks it and packs it."""
