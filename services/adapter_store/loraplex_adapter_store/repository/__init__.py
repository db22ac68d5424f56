"""The store's data in Valkey: canonical blobs, the catalog of names, garbage, and which engine holds which image."""
