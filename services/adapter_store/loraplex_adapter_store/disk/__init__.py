"""The store's disk tier: page images and canonical forms in files that outlive a restart."""
