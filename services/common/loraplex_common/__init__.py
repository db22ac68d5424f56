"""What the services share: errors, wiring, and the one definition of an adapter's page image."""
