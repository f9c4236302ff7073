"""From items to stored vectors."""
