"""The architectures that are served: what each reads from config.json; one file each, listed in `registry`.

Without torch: the gateway and the adapter store read models, too.
"""
