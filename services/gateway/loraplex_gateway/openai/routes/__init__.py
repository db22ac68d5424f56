"""The families of routes of the HTTP port: each module returns its endpoints."""
