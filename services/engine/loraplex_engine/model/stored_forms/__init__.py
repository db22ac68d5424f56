"""Unpacks quantised weights while they are loaded; what config.json says of them: `loraplex_common.stored_forms`."""
