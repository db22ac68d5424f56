"""What the store keeps in Valkey: canonical blobs, the catalog of names, garbage, and who holds what."""
